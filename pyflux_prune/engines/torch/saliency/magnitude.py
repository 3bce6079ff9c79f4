"""Criteria of the weights alone; those that divide do so in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ....choices import Magnitude, RandomSaliency, Threshold
from ...base import Samples
from .base import score

if TYPE_CHECKING:
    from ..model import TorchModel


@score.register(Magnitude)
def _(criterion: Magnitude, model: TorchModel, data: Samples | None) -> list[Tensor]:
    magnitudes = [weight.detach().abs() for weight in model.weights]
    if not criterion.scaled:
        return magnitudes
    magnitudes = [values.double() for values in magnitudes]
    return [values / _rms(values[mask]) for values, mask in zip(magnitudes, model.masks, strict=True)]


def _rms(values: Tensor) -> Tensor:
    """Return the root mean square; 1 where there is nothing, or nothing but zeros."""
    rms = values.square().mean().sqrt()
    return torch.where(values.any(), rms, 1.0)


@score.register(Threshold)
def _(criterion: Threshold, model: TorchModel, data: Samples | None) -> list[Tensor]:
    scores = []
    for weight, mask in zip(model.weights, model.masks, strict=True):
        values = weight.detach().double()
        tau = torch.tensor(criterion.tau or 0.0, dtype=torch.float64)
        if criterion.tau is None and mask.any():
            tau = criterion.q * values[mask].std(correction=0)
        scores.append(torch.where(tau == 0, torch.inf, values.abs() / tau))
    return scores


@score.register(RandomSaliency)
def _(criterion: RandomSaliency, model: TorchModel, data: Samples | None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(criterion.seed)
    return [torch.rand(weight.shape, generator=generator) for weight in model.weights]
