"""Does a criterion know what deleting a weight costs (LeCun et al. 1990, Hassibi & Stork 1993)?

First the rank correlation of scores with what deleting each weight alone adds to the training loss; then test
accuracy as a trained network is pruned, 5 % of the weights at a time, and never trained again.
"""

import argparse
from itertools import takewhile
from statistics import mean

import numpy as np
from scipy.special import log_softmax
from scipy.stats import spearmanr

import pyflux_prune as fp

# OBS in one iteration, so that every criterion is scored as often.
CRITERIA = {
    "magnitude": fp.Magnitude(),
    "Taylor": fp.Taylor(),
    "OBD": fp.OBD(),
    "OBS by layer": fp.OBS(iterations=1),
    "OBS of all weights together": fp.OBS(full=True, iterations=1),
}
GRID = [k / 20 for k in range(1, 20)]

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--engine", default="auto", choices=["auto", "julia", "torch"])
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--hidden", type=int, default=16, help="units of the hidden layer")
parser.add_argument("--epochs", type=int, default=100)
parser.add_argument("--exact", action="store_true", help="also OBD with the exact Hessian, which takes minutes")
options = parser.parse_args()
if options.exact:
    CRITERIA["OBD, exact"] = fp.OBD(exact=True)


def loss_increases(net):
    first, bias, last, shift = (a.astype(float) for la in net.layers for a in (la.weight, la.bias))

    def loss():
        logits = np.maximum(data.x_train @ first.T + bias, 0) @ last.T + shift
        return -log_softmax(logits, axis=1)[np.arange(len(logits)), data.y_train].mean()

    dense, increases = loss(), []
    for weight in (first, last):
        for place, value in np.ndenumerate(weight):
            weight[place] = 0
            increases.append(loss() - dense)
            weight[place] = value
    return increases


def furthest(run):
    fine = takewhile(lambda r: r.accuracy >= run.baseline.accuracy - 0.01, run.rounds)
    return max((r.sparsity for r in fine), default=0.0)


def show(values, form):
    return f"{mean(values):{form}} ({min(values):{form}}–{max(values):{form}})"


data = fp.datasets.digits()
training = fp.Training(epochs=options.epochs, optimiser=fp.Adam(3e-3))
ranks, runs = {name: [] for name in CRITERIA}, {name: [] for name in CRITERIA}
for seed in range(options.seeds):
    net = fp.mlp([data.features, options.hidden, data.classes], seed=seed, engine=options.engine)
    fp.iterative_prune(net, data, schedule=[0.0], finetune=None, training=training, seed=seed)  # only trains
    costs = loss_increases(net)
    for name, criterion in CRITERIA.items():
        scores = net.model.scores(criterion, (data.x_train, data.y_train))
        ranks[name].append(spearmanr(np.concatenate([s.ravel() for s in scores]), costs).statistic)
        how = {"saliency": criterion, "schedule": GRID, "finetune": None, "pretrain": False}
        runs[name].append(fp.iterative_prune(net.copy(), data, **how))

print("| criterion | rank correlation | within 1 point of dense | 50 % pruned | 70 % | 80 % | 90 % |")
print("|:--|--:|--:|--:|--:|--:|--:|")
for name, found in runs.items():
    at = (mean(run.rounds[GRID.index(s)].accuracy for run in found) for s in (0.5, 0.7, 0.8, 0.9))
    row = [show(ranks[name], ".2f"), show([furthest(run) for run in found], ".0%"), *(f"{a:.1%}" for a in at)]
    print(f"| {name} | {' | '.join(row)} |")
