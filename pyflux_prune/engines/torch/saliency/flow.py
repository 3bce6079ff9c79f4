"""Criteria of the paths through the network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ....choices import SynFlow
from ...base import Samples
from .base import score

if TYPE_CHECKING:
    from ..model import TorchModel


@score.register(SynFlow)
def _(criterion: SynFlow, model: TorchModel, data: Samples | None) -> list[Tensor]:
    magnitudes = [weight.abs().requires_grad_() for weight in model.double().weights]
    flow = torch.ones(magnitudes[0].shape[1], dtype=torch.float64)
    for magnitude in magnitudes:
        flow = magnitude @ flow
    gradients = torch.autograd.grad(flow.sum(), magnitudes)
    return [(size * g).detach() for size, g in zip(magnitudes, gradients, strict=True)]
