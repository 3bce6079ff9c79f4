"""The lottery-ticket experiment on LeNet-300-100 (Frankle & Carbin 2019, figure 4), with both controls.

Each round prunes the 20 % of the weights of each layer (10 % of the output layer's) that ended up smallest, and
trains the others again from their initial values: the ticket. The same masks on new initial weights, and random
masks on the ticket's own, show whether it takes both.
"""

import argparse

import pyflux_prune as fp

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("data", help="mnist:DIR with the four IDX files, or digits")
parser.add_argument("--engine", default="auto", choices=["auto", "julia", "torch"])
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--rounds", type=int, default=15)
parser.add_argument("--epochs", type=int, default=12, help="of each training, three in each round")
options = parser.parse_args()

data = fp.datasets.load(options.data)
found = fp.lottery_ticket(
    [data.features, 300, 100, data.classes],
    data,
    schedule=fp.Exponential(rate=(0.2, 0.2, 0.1), rounds=options.rounds),
    training=fp.Training(epochs=options.epochs),
    seeds=range(options.seeds),
    engine=options.engine,
)
print(found.markdown())
print(found.answer)
