"""Five ways to 1 % of the weights in one training: masks that stay, masks that move, and pruning on the way.

Moving masks: SET (Mocanu et al. 2018), RigL (Evci et al. 2020). Pruning bit by bit: Zhu & Gupta 2017.
"""

import argparse
from statistics import mean

import pyflux_prune as fp

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("data", help="mnist:DIR with the four IDX files, or digits")
parser.add_argument("--engine", default="auto", choices=["auto", "julia", "torch"])
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--sparsity", type=float, default=0.99)
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--every", type=int, default=50, help="training steps between two changes of moving masks")
options = parser.parse_args()

data, s = fp.datasets.load(options.data), options.sparsity
accuracies = {}
for seed in range(options.seeds):
    how = {"training": fp.Training(epochs=options.epochs), "seed": seed}
    only_train = {"pretrain": False, "finetune": fp.Continue(), **how}
    dense = fp.mlp([data.features, 300, 100, data.classes], seed=seed, engine=options.engine)
    sparse = fp.prune(dense.copy(), fp.RandomSaliency(seed), sparsity=s, structure=fp.ERK())
    unpruned, fixed = (
        fp.iterative_prune(net.copy(), data, schedule=[net.sparsity], **only_train) for net in (dense, sparse)
    )
    moving = {
        name: fp.sparse_train(sparse.copy(), data, method=method, every=options.every, **how)
        for name, method in {"SET": fp.SET(), "RigL": fp.RigL()}.items()
    }
    once, gradual = (
        fp.gradual_prune(dense.copy(), data, schedule=schedule, **how)
        for schedule in (fp.OneShot(s), fp.Polynomial(s, rounds=10))
    )
    for name, last in {
        "dense": unpruned.rounds[-1],
        "random masks that stay": fixed.rounds[-1],
        "random masks that move, SET": moving["SET"],
        "random masks that move, RigL": moving["RigL"],
        "pruned by magnitude at once, half way": once.rounds[-1],
        "pruned by magnitude, bit by bit": gradual.rounds[-1],
    }.items():
        accuracies.setdefault((name, f"{1 - last.sparsity:.1%}"), []).append(last.accuracy)

print("| network | weights kept | test accuracy |\n|:--|--:|--:|")
for (name, kept), a in accuracies.items():
    print(f"| {name} | {kept} | {mean(a):.1%} ({min(a):.1%}–{max(a):.1%}) |")
