"""Criteria of the gradient of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ....choices import SNIP, GraSP, Taylor
from ....errors import InvalidInput
from ...base import Samples
from ..double import Double, samples
from .base import score

if TYPE_CHECKING:
    from ..model import TorchModel


def _times(factors: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    return [a * b for a, b in zip(factors, others, strict=True)]


@score.register(Taylor)
def _(criterion: Taylor, model: TorchModel, data: Samples | None) -> list[Tensor]:
    net, (x, y) = model.double(), samples(data)
    parts = list(zip(torch.split(x, criterion.batchsize), torch.split(y, criterion.batchsize), strict=True))
    scores = [torch.zeros_like(weight) for weight in net.weights]
    for part in parts:
        for total, change in zip(scores, _times(net.gradients(*part), net.weights), strict=True):
            total += change.square() if criterion.squared else change.abs()
    return [total / len(parts) for total in scores]


def _balanced(criterion: SNIP | GraSP, net: Double, data: Samples | None) -> tuple[Tensor, Tensor]:
    """Return the first ``per_class`` samples of each class."""
    x, y = samples(data)
    members = [(y == label).nonzero().squeeze(1) for label in range(net.classes)]
    for label, found in enumerate(members):
        if len(found) < criterion.per_class:
            raise InvalidInput(
                f"{type(criterion).__name__} needs {criterion.per_class} samples of each of the {net.classes} "
                f"classes, but data has {len(found)} of class {label}"
            )
    first = torch.cat([found[: criterion.per_class] for found in members])
    return x[first], y[first]


@score.register(SNIP)
def _(criterion: SNIP, model: TorchModel, data: Samples | None) -> list[Tensor]:
    net = model.double()
    gradients = net.gradients(*_balanced(criterion, net, data))
    return [change.abs() for change in _times(gradients, net.weights)]


@score.register(GraSP)
def _(criterion: GraSP, model: TorchModel, data: Samples | None) -> list[Tensor]:
    net = model.double()
    x, y = _balanced(criterion, net, data)

    def loss(weights: tuple[Tensor, ...]) -> Tensor:
        return net.loss(x, y, weights, criterion.temperature)

    gradients, hessian_times = torch.func.vjp(torch.func.grad(loss), tuple(net.weights))[:2]
    return _times(hessian_times(gradients)[0], net.weights)
