"""What a network costs: parameters, bytes and FLOPs, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from .engines import Layer


@dataclass(frozen=True)
class LayerCost:
    """The cost of one layer.

    Attributes:
        name: its place in the equivalent ``torch.nn.Sequential``.
        shape: (out, in).
        density: kept weights ÷ all weights.
        nonzero: kept weights.
        bytes: what its tensors take in a model file of the same kind.
        flops: 2 per multiply–add of a kept weight, per sample.

    """

    name: str
    shape: tuple[int, int]
    density: float
    nonzero: int
    bytes: int
    flops: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def measure(layers: Sequence[Layer], *, sparse: bool = False) -> list[LayerCost]:
    """Return the cost of each layer; ``sparse`` for the bytes of a sparse model file."""
    costs = []
    for la in layers:
        kept, bits = int(la.mask.sum()), -(-la.mask.size // 8)
        values = 4 * (kept if sparse else la.mask.size)
        mask = bits if sparse or kept < la.mask.size else 0
        bias = 0 if la.bias is None else 4 * la.bias.size
        out, n_in = la.weight.shape
        costs.append(LayerCost(la.name, (out, n_in), la.density, kept, values + mask + bias, 2 * kept))
    return costs


def table(costs: Sequence[LayerCost], file_bytes: int) -> Table:
    """Return the costs, their sums, and the size of the file, as a table to print."""
    shown = Table(show_footer=True)
    weights = sum(c.shape[0] * c.shape[1] for c in costs)
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
        shape = f"{c.shape[0]} × {c.shape[1]}"
        shown.add_row(c.name, shape, f"{c.density:.2%}", f"{c.nonzero:,}", f"{c.bytes:,}", f"{c.flops:,}")
    return shown
