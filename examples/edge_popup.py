"""A network that is never trained, and works: edge-popup only chooses weights (Ramanujan et al. 2020)."""

import argparse
from statistics import mean

import pyflux_prune as fp

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--engine", default="auto", choices=["auto", "julia", "torch"])
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--width", type=int, default=512, help="units of each of the two hidden layers")
parser.add_argument("--sparsity", type=float, default=0.5)
parser.add_argument("--epochs", type=int, default=20)
options = parser.parse_args()

data = fp.datasets.digits()
training = fp.Training(epochs=options.epochs, optimiser=fp.Adam(3e-3))  # of the scores
accuracies = {}
for seed in range(options.seeds):
    sizes = [data.features, options.width, options.width, data.classes]
    initial = fp.mlp(sizes, seed=seed, engine=options.engine)
    networks = {"all weights": initial}
    for name, criterion in (
        ("random ones", fp.RandomSaliency(seed)),
        ("the largest", fp.Magnitude()),
        ("chosen by edge-popup", fp.EdgePopup(options.sparsity, training)),
    ):
        networks[name] = fp.prune(
            initial.copy(), criterion, sparsity=options.sparsity, structure=fp.Layerwise(), data=data
        )
        for before, after in zip(initial.layers, networks[name].layers, strict=True):
            assert (after.weight == before.weight * after.mask).all()  # those kept are the initial ones
            assert (after.bias == before.bias).all()
    for name, net in networks.items():
        accuracies.setdefault(name, []).append((net.predict(data.x_test) == data.y_test).mean())

print("| initial weights used | share | test accuracy |\n|:--|--:|--:|")
for name, a in accuracies.items():
    share = networks[name].density
    print(f"| {name} | {share:.0%} | {mean(a):.1%} ({min(a):.1%}–{max(a):.1%}) |")
