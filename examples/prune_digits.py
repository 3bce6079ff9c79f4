"""Prune a network on scikit-learn's digits to a tenth of its weights, and look at what is left."""

import argparse

import pyflux_prune as fp

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--engine", default="auto", choices=["auto", "julia", "torch"])
parser.add_argument("--epochs", type=int, default=15)
options = parser.parse_args()

data = fp.datasets.digits()
net = fp.mlp([64, 300, 100, 10], seed=0, engine=options.engine)
run = fp.iterative_prune(
    net,
    data,
    schedule=fp.Polynomial(sparsity=0.9, rounds=5),
    finetune=fp.Continue(),
    training=fp.Training(epochs=options.epochs),
)

print(f"dense: {run.baseline.accuracy:.2%}")
for r in run.rounds:
    print(f"{r.sparsity:6.1%} pruned: {r.accuracy:.2%}")
for layer in net.layers:
    print(f"layer {layer.name}: {layer.mask.sum()} of {layer.mask.size} weights kept")
