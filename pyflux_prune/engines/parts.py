"""What networks are made of: values with NumPy arrays, in PyTorch's layouts, that cross from and to engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidInput

Float = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]
Int = npt.NDArray[np.int64]
Pair = tuple[int, int]
"""(height, width)."""

ACTIVATIONS = ("identity", "relu", "tanh", "sigmoid")
"""Activations that both engines and the model file know."""


@dataclass(frozen=True)
class Input:
    """The shape of one sample, the first part of a network of convolutions; engines take samples flattened.

    Attributes:
        shape: (channels, height, width).

    """

    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Layer:
    """One prunable dense layer, σ.((weight .* mask) * x .+ bias).

    Attributes:
        name: its place in the equivalent ``torch.nn.Sequential``, where activations count ("0", "2", …); unique.
        weight: (out, in) float32; exactly 0 where pruned.
        mask: (out, in) bool; True keeps.
        bias: (out,) float32, or None.
        activation: one of ``ACTIVATIONS``.

    """

    name: str
    weight: Float
    mask: Bool
    bias: Float | None
    activation: str

    @property
    def density(self) -> float:
        """The share of weights that is kept."""
        return float(self.mask.mean()) if self.mask.size else 1.0

    @property
    def sparsity(self) -> float:
        """The share of weights that is pruned."""
        return 1.0 - self.density


@dataclass(frozen=True)
class ConvLayer(Layer):
    """One prunable convolution: weight and mask are (out, in, height, width), as in ``torch.nn.Conv2d``.

    Attributes:
        stride: (height, width).
        padding: (height, width), with zeros on both sides.
        dilation: (height, width).

    """

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)


@dataclass(frozen=True)
class BatchNorm:
    """Batch normalisation of each channel, σ.(weight .* (x .- mean) ./ √(variance + epsilon) .+ bias).

    In training, mean and variance are those of the batch, and the stored ones move towards them (the variance as
    estimated without bias) by the share ``momentum``.

    Attributes:
        name: its place in the equivalent ``torch.nn.Sequential``.
        weight: (channels,) float32, as are bias, mean and variance.
        bias: (channels,).
        mean: (channels,).
        variance: (channels,).
        activation: one of ``ACTIVATIONS``.
        epsilon: above 0.
        momentum: in [0, 1].

    """

    name: str
    weight: Float
    bias: Float
    mean: Float
    variance: Float
    activation: str = "identity"
    epsilon: float = 1e-5
    momentum: float = 0.1


@dataclass(frozen=True)
class Pool:
    """The maximum or the mean over windows, as in ``torch.nn.MaxPool2d`` and ``AvgPool2d``.

    Attributes:
        name: its place in the equivalent ``torch.nn.Sequential``.
        kind: "max" or "mean"; a mean counts padded zeros.
        size: of a window, (height, width).
        stride: (height, width).
        padding: (height, width), at most half of ``size``.

    """

    name: str
    kind: str
    size: Pair
    stride: Pair
    padding: Pair = (0, 0)


@dataclass(frozen=True)
class Flatten:
    """Each sample as a vector: channels, then rows, then columns.

    Attributes:
        name: its place in the equivalent ``torch.nn.Sequential``.

    """

    name: str


Part = Input | Layer | BatchNorm | Pool | Flatten


def layer_names(activations: Sequence[str]) -> list[str]:
    """Return the names of parts with these activations: an activation takes the number after its part's."""
    sizes = [1 if a == "identity" else 2 for a in activations]
    return [str(sum(sizes[:i])) for i in range(len(sizes))]


def prunable(parts: Sequence[Part]) -> list[Layer]:
    """Return the parts that can be pruned."""
    return [part for part in parts if isinstance(part, Layer)]


def input_shape(parts: Sequence[Part]) -> tuple[int, ...]:
    """Return the shape of one sample, (features,) or (channels, height, width)."""
    first = parts[0]
    return first.shape if isinstance(first, Input) else prunable(parts)[0].weight.shape[1:]


def shapes(parts: Sequence[Part]) -> list[tuple[int, ...]]:
    """Return the shape of one sample after each part, (features,) or (channels, height, width).

    Raises:
        InvalidInput: there is no prunable layer, or a part does not fit what comes before it.

    """
    if not prunable(parts):
        raise InvalidInput("a network must have at least one dense layer or convolution, but there is none")
    found: list[tuple[int, ...]] = []
    now = input_shape(parts)
    for place, part in enumerate(parts):
        now = _after(part, now, place)
        found.append(now)
    if not isinstance(parts[-1], Layer) or len(now) != 1:
        raise InvalidInput("a network must end with a dense layer, whose outputs are the classes")
    return found


def _after(part: Part, shape: tuple[int, ...], place: int) -> tuple[int, ...]:
    """Return the shape that a part makes of another."""
    match part:
        case Input():
            if place:
                raise InvalidInput("the shape of the inputs must come first")
            return shape
        case ConvLayer():
            _expect(part.name, "channels", part.weight.shape[1], shape, 3)
            windows = [(k - 1) * d + 1 for k, d in zip(part.weight.shape[2:], part.dilation, strict=True)]
            return (len(part.weight), *_slide(part.name, shape, windows, part.stride, part.padding))
        case Layer():
            _expect(part.name, "features", part.weight.shape[1], shape, 1)
            return (len(part.weight),)
        case BatchNorm():
            _expect(part.name, "channels", len(part.weight), shape, len(shape))
            return shape
        case Pool():
            _expect(part.name, "channels", shape[0], shape, 3)
            return (shape[0], *_slide(part.name, shape, part.size, part.stride, part.padding))
        case Flatten():
            return (int(np.prod(shape)),)


def _expect(name: str, what: str, wanted: int, shape: tuple[int, ...], dimensions: int) -> None:
    if len(shape) != dimensions or shape[0] != wanted:
        kind = {1: f"({what},)", 3: f"({what}, height, width)"}[dimensions]
        raise InvalidInput(f"layer {name} takes {kind} with {wanted} {what}, but the part before it gives {shape}")


def _slide(
    name: str, shape: tuple[int, ...], window: Sequence[int], stride: Pair, padding: Pair
) -> tuple[int, int]:
    """Return how many places, (height, width), a window has that moves over an image."""
    room = [n + 2 * p - w for n, p, w in zip(shape[1:], padding, window, strict=True)]
    if min(room) < 0:
        raise InvalidInput(f"layer {name} has windows of {tuple(window)}, but the part before it gives {shape}")
    height, width = (r // s + 1 for r, s in zip(room, stride, strict=True))
    return height, width


def copies(parts: Sequence[Part]) -> list[Part]:
    """Return the parts with arrays of their own."""
    return [with_arrays(part, {name: array.copy() for name, array in arrays(part).items()}) for part in parts]


def arrays(part: Part) -> dict[str, npt.NDArray[np.float32 | np.bool_]]:
    """Return the arrays that a part holds, by the names of its fields."""
    return {name: value for name, value in vars(part).items() if isinstance(value, np.ndarray)}


def with_arrays(part: Part, found: Mapping[str, npt.NDArray[Any]]) -> Part:
    """Return the part with other arrays in the place of those of these names."""
    any_part: Any = part
    changed: Part = replace(any_part, **found)
    return changed
