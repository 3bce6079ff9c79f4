"""Prune whole neurons and take them out: a network that is smaller, and faster without special kernels."""

import argparse
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from time import perf_counter

import pyflux_prune as fp
from pyflux_prune.measure import measure

NEURONS = (0.4, 0.6, 0.7, 0.8, 0.85)  # shares of the hidden neurons that are pruned

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--engine", default="auto", choices=["auto", "julia", "torch"])
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--epochs", type=int, default=15, help="of training, and again after each pruning")
parser.add_argument("--repetitions", type=int, default=200, help="forward passes of each network to time")
options = parser.parse_args()


def train(seed, sizes, schedule, **choices):
    net = fp.mlp(sizes, seed=seed, engine=options.engine)
    how = {"finetune": fp.Continue(), "training": fp.Training(epochs=options.epochs), "seed": seed}
    fp.iterative_prune(net, data, schedule=schedule, **how, **choices)
    return net


def bytes_saved(net):
    with TemporaryDirectory() as folder:
        net.save(path := Path(folder, "net.safetensors"))
        return path.stat().st_size


def seconds(net):
    began = perf_counter()
    net(data.x_train)
    return perf_counter() - began


def show(values, form):
    extremes = f" ({min(values):{form}}–{max(values):{form}})" if min(values) < max(values) else ""
    return f"{mean(values):{form}}{extremes}"


data = fp.datasets.digits()
found = {}
for seed in range(options.seeds):
    sizes, unpruned = [data.features, 300, 100, data.classes], [0.0] * len(NEURONS)
    nets = {"dense": train(seed, sizes, unpruned)}
    nets["neurons masked"] = train(seed, sizes, NEURONS, saliency=fp.Taylor(), structure=fp.Neurons())
    nets["neurons taken out"] = small = nets["neurons masked"].compact()
    nets["as small from the start"] = train(seed, [data.features, *(len(w) for w in small.weights)], unpruned)
    times = [[seconds(net) for net in nets.values()] for _ in range(options.repetitions)]  # in turn
    typical = [median(column) for column in zip(*times, strict=True)]
    for (name, net), t in zip(nets.items(), typical, strict=True):
        parameters = sum(la.weight.size + la.bias.size for la in net.layers)
        flops = sum(cost.flops for cost in measure(net.layers))
        accuracy = (net.predict(data.x_test) == data.y_test).mean()
        row = (parameters, bytes_saved(net), flops, typical[0] / t, accuracy)
        found.setdefault(name, []).append(row)

print("| network | parameters | bytes | FLOPs | speed | test accuracy |\n|:--|--:|--:|--:|--:|--:|")
for name, rows in found.items():
    forms = (",.0f", ",.0f", ",.0f", ".1f", ".1%")
    columns = [show(values, form) for values, form in zip(zip(*rows, strict=True), forms, strict=True)]
    print(f"| {name} | {' | '.join(columns)} |")
