"""Run the same pruning experiment in Julia and in PyTorch, and take a pruned network from one to the other."""

import argparse

import numpy as np
import torch

import pyflux_prune as fp

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--rounds", type=int, default=3)
options = parser.parse_args()

data = fp.datasets.digits()
net = fp.mlp([64, 300, 100, 10], seed=0, engine="julia")
result = fp.crosscheck(
    net,
    data,
    schedule=fp.Exponential(rate=0.5, rounds=options.rounds),
    training=fp.Training(epochs=options.epochs),
)
for difference in result.differences:
    print(f"round {difference.round}: {difference.quantity:32} {difference.value:.1e}")
assert result.ok

fp.prune(net, fp.Magnitude(), sparsity=0.9)
module = fp.to_torch(net)  # weight_orig and weight_mask, as torch.nn.utils.prune leaves them
with torch.no_grad():
    outputs = module(torch.from_numpy(data.x_test)).numpy()
print("largest difference of the outputs:", np.abs(outputs - net(data.x_test)).max())
