"""How far can an untrained deep network be pruned until a layer is empty (Tanaka et al. 2020, figure 1)?

For each criterion, the largest compression, on a grid with four steps to a factor of ten, up to which every layer
keeps weights, and up to which there is still a path from an input to an output.
"""

import argparse
import warnings
from functools import reduce
from itertools import takewhile
from statistics import geometric_mean

import numpy as np

import pyflux_prune as fp

GRID = [10 ** (k / 4) for k in range(4, 15)]  # 10 to 3,162

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--engine", default="auto", choices=["auto", "julia", "torch"])
parser.add_argument("--seeds", type=int, default=5)
parser.add_argument("--depth", type=int, default=10, help="layers of weights")
parser.add_argument("--width", type=int, default=64, help="units of each hidden layer")
options = parser.parse_args()


def pruned(criterion, compression, seed):
    net = fp.mlp(sizes, seed=seed, engine=options.engine)
    return fp.prune(net, criterion, sparsity=1 - 1 / compression, data=data)


def every_layer(net):
    return all(mask.any() for mask in net.masks)


def path(net):
    return reduce(lambda reached, mask: mask @ reached, net.masks, np.ones(net.features, bool)).any()


def limit(networks, survives):
    return max(takewhile(lambda compression: survives(networks[compression]), GRID), default=1)


def show(compressions):
    return f"{geometric_mean(compressions):,.0f} ({min(compressions):,.0f}–{max(compressions):,.0f})"


warnings.simplefilter("ignore", fp.LayerCollapse)  # that is what this is about
data = fp.datasets.digits()
sizes = [data.features, *[options.width] * (options.depth - 1), data.classes]
limits = {}
for seed in range(options.seeds):
    for criterion in (fp.RandomSaliency(seed), fp.Magnitude(), fp.SNIP(), fp.GraSP(), fp.SynFlow()):
        networks = {compression: pruned(criterion, compression, seed) for compression in GRID}
        for survives in (every_layer, path):
            found = limits.setdefault(type(criterion).__name__, {}).setdefault(survives, [])
            found.append(limit(networks, survives))

print("| criterion | every layer keeps weights up to | a path is left up to |\n|:--|--:|--:|")
for name, found in limits.items():
    print(f"| {name} | {show(found[every_layer])} | {show(found[path])} |")
