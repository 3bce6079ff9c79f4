"""Networks without the neurons that do nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..parts import Layer
from .double import Double


@dataclass(frozen=True)
class _Rest:
    """What is left of a network: which neurons of each layer, and what their biases are to take over."""

    net: Double
    left: list[Tensor]
    shifts: list[Tensor]

    def shrink(self, place: int) -> bool:
        """Let neurons of one layer go, and return whether any could.

        A neuron goes if none of its outgoing weights is left, or none of its incoming ones: then it is the
        constant σ(b), and the next layer's biases take its part over. Where all would go, the first stays.
        """
        net, here = self.net, self.left[place]
        below = self.left[place - 1] if place else torch.ones_like(net.masks[0][0])
        fed = net.masks[place][:, below].any(1)
        stay = here & fed & net.masks[place + 1][self.left[place + 1]].any(0)
        if not stay.any():
            stay[here.nonzero()[0]] = True
        constant = here & ~stay & ~fed
        bias = net.biases[place]
        values = net.activations[place](self.shifts[place] if bias is None else bias + self.shifts[place])
        self.shifts[place + 1].add_(net.weights[place + 1][:, constant] @ values[constant])
        self.left[place] = stay
        return not torch.equal(stay, here)


def compact(layers: Sequence[Layer]) -> list[Layer]:
    """Return copies of the layers without the hidden neurons that do nothing, sought from the front each time."""
    rest = _Rest(
        Double.of(layers),
        [torch.ones(len(layer.weight), dtype=torch.bool) for layer in layers],
        [torch.zeros(len(layer.weight), dtype=torch.float64) for layer in layers],
    )
    while any(rest.shrink(place) for place in range(len(layers) - 1)):
        pass
    columns = [torch.ones_like(rest.net.masks[0][0]), *rest.left[:-1]]
    return [_part(*parts) for parts in zip(layers, rest.left, columns, rest.net.biases, rest.shifts, strict=True)]


def _part(layer: Layer, rows: Tensor, columns: Tensor, bias: Tensor | None, shift: Tensor) -> Layer:
    """Return some rows and columns of a layer, its bias shifted; it gets one if that changes anything."""
    shifted = None if bias is None and not shift[rows].any() else (shift if bias is None else bias + shift)[rows]
    out, into = rows.numpy(), columns.numpy()
    return replace(
        layer,
        weight=layer.weight[out][:, into],
        mask=layer.mask[out][:, into],
        bias=None if shifted is None else shifted.float().numpy(),
    )
