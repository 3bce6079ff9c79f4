"""What networks are made of: values with NumPy arrays, in PyTorch's layouts, that cross from and to engines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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


@dataclass(frozen=True, eq=False)
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


@dataclass(frozen=True, eq=False)
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


@dataclass(frozen=True, eq=False)
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


LIMIT = 2**31 - 1
"""No more values than these in one sample, anywhere in a network, so that sizes can be computed with."""


def numbered(parts: Iterable[Part]) -> list[Part]:
    """Return the parts with the names they have in the equivalent ``torch.nn.Sequential``.

    An activation takes the number after its part's; ``Input`` has no place there.
    """
    named: list[Part] = []
    place = 0
    for part in parts:
        if isinstance(part, Input):
            named.append(part)
        else:
            named.append(replace(part, name=str(place)))
            place += 1 if getattr(part, "activation", "identity") == "identity" else 2
    return named


def prunable(parts: Sequence[Part]) -> list[Layer]:
    """Return the parts that can be pruned."""
    return [part for part in parts if isinstance(part, Layer)]


def masked(parts: Sequence[Part], masks: Iterable[Bool]) -> list[Part]:
    """Return the parts, those that can be pruned with these masks."""
    each = iter(masks)
    return [replace(part, mask=next(each)) if isinstance(part, Layer) else part for part in parts]


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
    if any(isinstance(part, Input) for part in parts[1:]):
        raise InvalidInput("the shape of the inputs must come first")
    if not isinstance(parts[0], Input) and any(isinstance(part, ConvLayer | Pool | Flatten) for part in parts):
        raise InvalidInput("a network of convolutions must begin with the shape of its inputs")
    found = shapes_after(parts)
    if not isinstance(parts[-1], Layer) or len(found[-1]) != 1:
        raise InvalidInput("a network must end with a dense layer, whose outputs are the classes")
    return found


def shapes_after(parts: Sequence[Part]) -> list[tuple[int, ...]]:
    """Return what ``shapes`` does, of the first parts of a network."""
    found: list[tuple[int, ...]] = []
    now, before = input_shape(parts), "the input"
    for part in parts:
        now = after(part, now, before)
        found.append(now)
        before = before if isinstance(part, Input) else part.name
    return found


def after(part: Part, shape: tuple[int, ...], before: str) -> tuple[int, ...]:
    """Return the shape of a sample after a part that it comes to in a shape from the part called ``before``.

    Raises:
        InvalidInput: the part does not fit.

    """
    match part:
        case Input():
            made: tuple[int, ...] = part.shape
        case ConvLayer():
            _expect(part.name, part.weight.shape[1], "channels", shape, before, images=True)
            windows = [(k - 1) * d + 1 for k, d in zip(part.weight.shape[2:], part.dilation, strict=True)]
            made = (len(part.weight), *_slide(part.name, shape, windows, part.stride, part.padding))
        case Layer():
            _expect(part.name, part.weight.shape[1], "inputs", shape, before)
            made = (len(part.weight),)
        case BatchNorm():
            _expect(part.name, len(part.weight), "channels", shape, before, images=len(shape) == 3)
            made = shape
        case Pool():
            if any(2 * p > k for p, k in zip(part.padding, part.size, strict=True)):
                raise InvalidInput(
                    f"layer {part.name}: padding {part.padding} must be at most half of {part.size}"
                )
            _expect(part.name, shape[0], "channels", shape, before, images=True)
            made = (shape[0], *_slide(part.name, shape, part.size, part.stride, part.padding))
        case Flatten():
            made = (math.prod(shape),)
    if math.prod(made) > LIMIT:
        raise InvalidInput(f"a sample must have at most {LIMIT} values anywhere in a network, not {made}")
    return made


def _expect(
    name: str, wanted: int, what: str, shape: tuple[int, ...], before: str, *, images: bool = False
) -> None:
    if len(shape) != (3 if images else 1):
        kind = "images, (channels, height, width)" if images else "vectors, (features,)"
        raise InvalidInput(f"layer {name} takes {kind}, but {before} before it gives {shape}")
    if shape[0] != wanted:
        given = "outputs" if what == "inputs" else what
        raise InvalidInput(f"layer {name} takes {wanted} {what}, but {before} before it has {shape[0]} {given}")


def _slide(
    name: str, shape: tuple[int, ...], window: Sequence[int], stride: Pair, padding: Pair
) -> tuple[int, int]:
    """Return how many places, (height, width), a window has that moves over an image."""
    room = [n + 2 * p - w for n, p, w in zip(shape[1:], padding, window, strict=True)]
    if min(room) < 0:
        raise InvalidInput(f"layer {name} has windows of {tuple(window)}, which do not fit into {shape}")
    height, width = (r // s + 1 for r, s in zip(room, stride, strict=True))
    return height, width


def check_batches(parts: Sequence[Part], samples: int, batchsize: int, whose: str) -> None:
    """Raise InvalidInput where batch normalisation would meet a batch of a single value per channel.

    ``whose`` batch size it is, as in "training's", is said in the message.
    """
    last = samples % batchsize or batchsize
    if 1 not in (last, batchsize) or not any(isinstance(part, BatchNorm) for part in parts):
        return
    for part, shape in zip(parts, shapes(parts), strict=True):
        if isinstance(part, BatchNorm) and math.prod(shape[1:]) == 1:
            raise InvalidInput(
                f"{whose} batchsize {batchsize} makes a batch of one of {samples} samples, but layer "
                f"{part.name}, which normalises batches, needs two or more to train on"
            )


def alike(some: Sequence[Part], others: Sequence[Part]) -> bool:
    """Return whether parts are the same, in the same order, but for the values in their arrays."""
    return [_outline(part) for part in some] == [_outline(part) for part in others]


def _outline(part: Part) -> dict[str, Any]:
    """Return the type and the fields of a part, with the dtypes and shapes of arrays in their place."""
    described = {name: (array.dtype, array.shape) for name, array in arrays(part).items()}
    return {"type": type(part), **vars(part), **described}


def copies(parts: Sequence[Part]) -> list[Part]:
    """Return the parts with arrays of their own."""
    return [with_arrays(part, {name: array.copy() for name, array in arrays(part).items()}) for part in parts]


def arrays(part: Part) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays that a part holds, by the names of its fields."""
    return {name: value for name, value in vars(part).items() if isinstance(value, np.ndarray)}


def with_arrays(part: Part, found: Mapping[str, npt.NDArray[Any]]) -> Part:
    """Return the part with other arrays in the place of those of these names."""
    any_part: Any = part
    changed: Part = replace(any_part, **found)
    return changed
