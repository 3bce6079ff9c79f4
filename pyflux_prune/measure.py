"""What a network costs: parameters, bytes and FLOPs, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from .engines import Layer, Part
from .engines.parts import shapes


@dataclass(frozen=True)
class LayerCost:
    """The cost of one prunable layer.

    Attributes:
        name: its place in the equivalent ``torch.nn.Sequential``.
        shape: of the weight, (out, in) or (out, in, height, width).
        density: kept weights ÷ all weights.
        nonzero: kept weights.
        bytes: what its tensors take in a model file of the same kind.
        flops: 2 per multiply–add of a kept weight, at each place of a convolution, per sample.

    """

    name: str
    shape: tuple[int, ...]
    density: float
    nonzero: int
    bytes: int
    flops: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def measure(parts: Sequence[Part], *, sparse: bool = False) -> list[LayerCost]:
    """Return the cost of each prunable layer; ``sparse`` for the bytes of a sparse model file."""
    costs = []
    for la, after in zip(parts, shapes(parts), strict=True):
        if isinstance(la, Layer):
            kept, bits = int(la.mask.sum()), -(-la.mask.size // 8)
            values = 4 * (kept if sparse else la.mask.size)
            mask = bits if sparse or kept < la.mask.size else 0
            size = values + mask + (0 if la.bias is None else 4 * la.bias.size)
            flops = 2 * kept * math.prod(after[1:])
            costs.append(LayerCost(la.name, la.weight.shape, la.density, kept, size, flops))
    return costs


def table(costs: Sequence[LayerCost], file_bytes: int) -> Table:
    """Return the costs, their sums, and the size of the file, as a table to print."""
    shown = Table(show_footer=True)
    weights = sum(math.prod(c.shape) for c in costs)
    kept = sum(c.nonzero for c in costs)
    footers = (
        "file",
        "",
        f"{kept / weights:.2%}",
        f"{kept:,}",
        f"{file_bytes:,}",
        f"{sum(c.flops for c in costs):,}",
    )
    for heading, footer in zip(("layer", "shape", "density", "kept", "bytes", "FLOPs"), footers, strict=True):
        shown.add_column(heading, footer, justify="right")
    for c in costs:
        shape = " × ".join(map(str, c.shape))
        shown.add_row(c.name, shape, f"{c.density:.2%}", f"{c.nonzero:,}", f"{c.bytes:,}", f"{c.flops:,}")
    return shown
