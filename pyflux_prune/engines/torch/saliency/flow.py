"""Criteria of the paths through the network."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ....choices import SynFlow
from ...base import Samples
from .base import score

if TYPE_CHECKING:
    from ..model import TorchModel


@score.register(SynFlow)
def _(criterion: SynFlow, model: TorchModel, data: Samples | None) -> list[Tensor]:
    net = model.double()
    magnitudes = [weight.abs().requires_grad_() for weight in net.weights]
    linear = replace(net, biases=[None] * len(magnitudes), activations=[nn.Identity()] * len(magnitudes))
    flow = linear.forward(torch.ones(1, model.features, dtype=torch.float64), magnitudes)
    gradients = torch.autograd.grad(flow.sum(), magnitudes)
    return [(size * g).detach() for size, g in zip(magnitudes, gradients, strict=True)]
