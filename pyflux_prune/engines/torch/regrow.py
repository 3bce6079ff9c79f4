"""Prune and regrow."""

from __future__ import annotations

from functools import singledispatch
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...choices import SET, Regrowth, RigL
from ...errors import InvalidInput
from ..base import Samples
from .double import samples

if TYPE_CHECKING:
    from .model import TorchModel


@singledispatch
def growth(method: Regrowth, model: TorchModel, data: Samples) -> list[Tensor]:
    """Return how much each pruned weight of each layer wants to grow; the highest do."""
    raise InvalidInput(f"regrowth must be one that the torch engine has, not {method!r}")


@growth.register(SET)
def _(method: SET, model: TorchModel, data: Samples) -> list[Tensor]:
    generator = torch.Generator().manual_seed(method.seed)
    return [torch.rand(weight.shape, generator=generator, dtype=torch.float64) for weight in model.weights]


@growth.register(RigL)
def _(method: RigL, model: TorchModel, data: Samples) -> list[Tensor]:
    return [gradient.abs() for gradient in model.double().unmasked().gradients(*samples(data))]


def regrown(
    method: Regrowth, fraction: float, model: TorchModel, data: Samples
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the masks of the weights that give way, and of those that grow in their place."""
    gone, grown = [], []
    for name, weight, mask, wish in zip(
        model.names, model.weights, model.masks, growth(method, model, data), strict=True
    ):
        magnitudes = weight.detach().abs()
        if magnitudes[mask].isnan().any() or wish[~mask].isnan().any():
            raise InvalidInput(f"layer {name} cannot be regrown: its weights or their gradients are NaN")
        count = min(round(fraction * int(mask.sum())), int((~mask).sum()))
        gone.append(_first(magnitudes, mask, count))
        grown.append(_first(-wish, ~mask, count))
    return gone, grown


def _first(values: Tensor, among: Tensor, count: int) -> Tensor:
    """Return where the ``count`` lowest of some values are, the first of equals."""
    places = among.flatten().nonzero().squeeze(1)
    order = values.flatten()[places].argsort(stable=True)
    found = torch.zeros(among.numel(), dtype=torch.bool)
    found[places[order[:count]]] = True
    return found.view_as(among)
