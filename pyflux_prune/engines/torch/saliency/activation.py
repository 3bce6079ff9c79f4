"""Criteria of what passes through the network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ....choices import Activation, Wanda
from ...base import Samples
from ..double import samples
from .base import score

if TYPE_CHECKING:
    from ..model import TorchModel


@score.register(Wanda)
def _(criterion: Wanda, model: TorchModel, data: Samples | None) -> list[Tensor]:
    net, (x, _) = model.double(), samples(data)
    inputs = net.forward(x)[:-1]
    return [
        weight.abs() * torch.linalg.vector_norm(passed, dim=0)
        for weight, passed in zip(net.weights, inputs, strict=True)
    ]


@score.register(Activation)
def _(criterion: Activation, model: TorchModel, data: Samples | None) -> list[Tensor]:
    x, _ = samples(data)
    outputs = model.double().forward(x)[1:]
    if criterion.zeros:
        return [(passed != 0).double().mean(0) for passed in outputs]
    return [passed.abs().mean(0) for passed in outputs]
