"""Networks without the neurons that do nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from ..parts import BatchNorm, ConvLayer, Flatten, Layer, Part, Pool, arrays, prunable, with_arrays
from .modules import ACTIVATION_MODULES, tensor
from .structure import by_source


@dataclass(frozen=True)
class _Rest:
    """What is left of a network.

    Attributes:
        layers: the prunable parts.
        after: the parts between each layer and the next.
        left: which neurons of each layer are left.
        shifts: what the biases of each layer are to take over, in float64.

    """

    layers: list[Layer]
    after: list[list[Part]]
    left: list[Tensor]
    shifts: list[Tensor]

    def shrink(self, place: int) -> bool:
        """Let neurons, or filters, of one layer go, and return whether any could.

        A neuron goes if none of its outgoing weights is left, or none of its incoming ones: then it is a constant,
        and the next layer's biases take its part over. It stays where it is not 0 and meets padding, whose zeros
        make it differ from place to place. Where all would go, the first stays.
        """
        here, following = self.left[place], self.layers[place + 1]
        mask = tensor(self.layers[place].mask)
        below = self.left[place - 1] if place else torch.ones(mask.shape[1], dtype=torch.bool)
        fed = by_source(mask, len(below))[:, below].flatten(1).any(1)
        used = by_source(tensor(following.mask), len(here))[self.left[place + 1]].any(2).any(0)
        values, stuck = self._constants(place)
        stay = here & used & (fed | stuck)
        if not stay.any():
            stay[here.nonzero()[0]] = True
        constant = here & ~stay & ~fed
        outgoing = by_source(tensor(following.weight).double(), len(here))[:, constant]
        self.shifts[place + 1].add_((outgoing * values[constant]).sum((1, 2)))
        self.left[place] = stay
        return not torch.equal(stay, here)

    def _constants(self, place: int) -> tuple[Tensor, Tensor]:
        """Return what each neuron gives the next layer if nothing comes in, and whether that meets padding.

        The values are (neurons, 1), or after ``Flatten`` (neurons, places).
        """
        layer, following = self.layers[place], self.layers[place + 1]
        bias = 0.0 if layer.bias is None else tensor(layer.bias).double()
        values = _activated(layer, self.shifts[place] + bias)[:, None]
        stuck = torch.zeros(len(values), dtype=torch.bool)
        for part in self.after[place]:
            match part:
                case Pool(kind="mean"):
                    stuck |= any(part.padding) & (values[:, 0] != 0)
                case Flatten():
                    values = values.expand(-1, following.weight.shape[1] // len(values))
                case BatchNorm():
                    values = _normalised(part, values.flatten()).view_as(values)
        if isinstance(following, ConvLayer):
            stuck |= any(following.padding) & (values[:, 0] != 0)
        return values, stuck


def compact(parts: Sequence[Part]) -> list[Part]:
    """Return copies of the parts without the hidden neurons that do nothing, sought from the front each time."""
    layers = prunable(parts)
    after: list[list[Part]] = [[]]
    for part in parts:
        if isinstance(part, Layer):
            after.append([])
        else:
            after[-1].append(part)
    sizes = [len(layer.weight) for layer in layers]
    rest = _Rest(
        layers,
        after[1:],
        [torch.ones(size, dtype=torch.bool) for size in sizes],
        [torch.zeros(size, dtype=torch.float64) for size in sizes],
    )
    while any(rest.shrink(place) for place in range(len(layers) - 1)):
        pass
    found, below, ours = [], torch.ones(1, dtype=torch.bool), zip(rest.left, rest.shifts, strict=True)
    for part in parts:
        if isinstance(part, Layer):
            left, shift = next(ours)
            found.append(_fewer(part, left, below, shift))
            below = left
        else:
            found.append(_narrower(part, below) if isinstance(part, BatchNorm) else part)
    return found


def _fewer(layer: Layer, rows: Tensor, below: Tensor, shift: Tensor) -> Part:
    """Return some neurons of a layer, its bias shifted; it gets one if that changes anything."""
    out, into = rows.numpy(), _spread(below, layer.weight.shape[1]).numpy()
    found: dict[str, npt.NDArray[Any]] = {name: getattr(layer, name)[out][:, into] for name in ("weight", "mask")}
    if layer.bias is not None or shift[rows].any():
        bias = 0.0 if layer.bias is None else tensor(layer.bias).double()
        found["bias"] = (bias + shift)[rows].float().numpy()
    return with_arrays(layer, found)


def _narrower(norm: BatchNorm, below: Tensor) -> Part:
    """Return the batch normalisation of what is left."""
    left = _spread(below, len(norm.weight)).numpy()
    return with_arrays(norm, {name: values[left] for name, values in arrays(norm).items()})


def _spread(left: Tensor, size: int) -> Tensor:
    """Return which of so many features or channels are left, if each neuron gives as many."""
    return left.repeat_interleave(size // len(left))


def _normalised(norm: BatchNorm, values: Tensor) -> Tensor:
    mean, variance, weight, bias = (tensor(a).double() for a in (norm.mean, norm.variance, norm.weight, norm.bias))
    return _activated(norm, batch_norm(values[None], mean, variance, weight, bias, eps=norm.epsilon)[0])


def _activated(part: Layer | BatchNorm, values: Tensor) -> Tensor:
    activated: Tensor = ACTIVATION_MODULES.get(part.activation, nn.Identity)()(values)
    return activated
