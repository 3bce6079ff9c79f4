"""The lottery-ticket experiment on LeNet-300-100 (Frankle & Carbin 2019, figure 4).

Each round prunes the 20 % of the weights of each layer (10 % of the output layer's) that ended up smallest, and
trains the others again: from their initial values (the winning ticket), or from new random ones.
"""

import argparse
from statistics import mean

import pyflux_prune as fp

ROUNDS_SHOWN = (0, 3, 7, 12, 15)  # 100, 51.3, 21.1, 7.0 and 3.6 % of the weights

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("data", help="mnist:DIR with the four IDX files, or digits")
parser.add_argument("--engine", default="auto", choices=["auto", "julia", "torch"])
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--rounds", type=int, default=15)
parser.add_argument("--epochs", type=int, default=20)
options = parser.parse_args()

data = fp.datasets.load(options.data)
accuracies = {}
for finetune in (fp.Rewind(), fp.Reinitialize()):
    for seed in range(options.seeds):
        net = fp.mlp([data.features, 300, 100, data.classes], seed=seed, engine=options.engine)
        run = fp.iterative_prune(
            net,
            data,
            structure=fp.Layerwise(),
            schedule=fp.Exponential(rate=(0.2, 0.2, 0.1), rounds=options.rounds),
            finetune=finetune,
            training=fp.Training(epochs=options.epochs),
            seed=seed,
        )
        for r in (run.baseline, *run.rounds):
            accuracies.setdefault((finetune, r.round), []).append(r.accuracy)
            density = 1 - r.sparsity
            if r.round in ROUNDS_SHOWN:
                print(f"{finetune} seed {seed}: {density:6.1%} of the weights, {r.accuracy:.2%}", flush=True)

print("\n| weights | rewound | reinitialised |\n|--:|--:|--:|")
kept = {r.round: 1 - r.sparsity for r in (run.baseline, *run.rounds)}
for number in ROUNDS_SHOWN:
    if number in kept:
        rewound, again = (
            f"{mean(a):.2%} ({min(a):.2%}–{max(a):.2%})"
            for a in (accuracies[f, number] for f in (fp.Rewind(), fp.Reinitialize()))
        )
        print(f"| {kept[number]:.1%} | {rewound} | {again} |")
