"""Networks to begin with: a multilayer perceptron, LeNet-5 and VGGs, with new weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .choices import check_count, flag, listed, shown
from .datasets import check_shape
from .engines import ACTIVATIONS, BatchNorm, ConvLayer, Flatten, Input, Layer, Part, Pool
from .engines.parts import Float, Pair, numbered, shapes_after
from .errors import InvalidInput
from .files import naming
from .network import Network, build

VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
"""The ``channels`` of VGG-16, for ``vgg``: with one dense layer, what papers prune on CIFAR-10."""


def mlp(sizes: Sequence[int], *, activation: str = "relu", seed: int = 0, engine: str = "auto") -> Network:
    """Return a multilayer perceptron with Glorot-uniform weights and zero biases.

    Args:
        sizes: the number of inputs, of units in each hidden layer, and of outputs.
        activation: of the hidden layers: identity, relu, tanh or sigmoid.
        seed: the same seed gives the same weights on both engines.
        engine: "auto", "julia" or "torch".

    Raises:
        InvalidInput: fewer than two sizes, a size below 1, or an unknown activation or engine.
        EngineUnavailable: the engine cannot be had here.

    """
    widths = [check_count("each of sizes", n, 1) for n in listed(sizes) or ()]
    if len(widths) < 2:
        raise InvalidInput(f"sizes must hold at least the numbers of inputs and outputs, not {shown(sizes)}")
    new = _New(activation, seed)
    return build(numbered(new.dense(widths)), engine)


def lenet5(
    *,
    input_shape: Sequence[int] = (1, 28, 28),
    classes: int = 10,
    activation: str = "relu",
    seed: int = 0,
    engine: str = "auto",
) -> Network:
    """Return LeNet-5 as the pruning literature has it (LeCun, Bottou, Bengio & Haffner 1998).

    Convolutions of 6 and of 16 filters of 5×5, each followed by pooling over 2×2, then dense layers of 120 and 84
    units. Pooling takes the maximum, every filter of the second convolution sees all of the first, and the outputs
    are linear; in the original, pooling is a trained mean. Images below 32×32, the size in the paper, are padded
    by 2 on each side. Weights are Glorot-uniform, biases 0.

    Args:
        input_shape: (channels, height, width) of a sample; at least 12×12.
        classes: the number of outputs.
        activation: of all layers but the last: identity, relu, tanh or sigmoid.
        seed: the same seed gives the same weights on both engines.
        engine: "auto", "julia" or "torch".

    Raises:
        InvalidInput: an argument is none of these, or images are too small.
        EngineUnavailable: the engine cannot be had here.

    """
    channels, height, width = check_shape("input_shape", input_shape)
    padding = (2 if height < 32 else 0, 2 if width < 32 else 0)
    new = _New(activation, seed)
    front: list[Part] = [
        Input((channels, height, width)),
        new.conv(channels, 6, (5, 5), padding),
        _pool(),
        new.conv(6, 16, (5, 5)),
        _pool(),
        Flatten(""),
    ]
    with naming("lenet5"):
        return _with_dense(front, new, (120, 84, check_count("classes", classes, 1)), engine)


def vgg(
    channels: Sequence[int | str] = (32, "M", 64, "M"),
    hidden: Sequence[int] = (),
    *,
    input_shape: Sequence[int] = (1, 28, 28),
    classes: int = 10,
    batch_norm: bool = True,
    activation: str = "relu",
    seed: int = 0,
    engine: str = "auto",
) -> Network:
    """Return a network like VGG (Simonyan & Zisserman 2015, arXiv:1409.1556), as small as ``channels`` says.

    Convolutions of 3×3, padded so that images keep their size, and dense layers at the end. With ``batch_norm``,
    each convolution is followed by batch normalisation, and has no bias, which that would take away again. Weights
    are Glorot-uniform, biases 0.

    Args:
        channels: the number of filters of each convolution, and "M" for pooling: the maximum over 2×2; ``VGG16``
            for images of 32×32 or larger.
        hidden: the number of units of each dense layer but the last.
        input_shape: (channels, height, width) of a sample.
        classes: the number of outputs.
        batch_norm: whether convolutions are followed by batch normalisation.
        activation: of all layers but the last, after the normalisation: identity, relu, tanh or sigmoid.
        seed: the same seed gives the same weights on both engines.
        engine: "auto", "julia" or "torch".

    Raises:
        InvalidInput: an argument is none of these, or images are too small.
        EngineUnavailable: the engine cannot be had here.

    """
    shape = check_shape("input_shape", input_shape)
    stages, units = listed(channels), listed(hidden)
    for name, given, found in (("channels", channels, stages), ("hidden", hidden, units)):
        if found is None:
            example = (32, "M") if name == "channels" else (100,)
            raise InvalidInput(f"{name} must be a sequence, such as {example}, not {shown(given)}")
    normalised = flag("batch_norm", batch_norm)
    new, now = _New(activation, seed), shape[0]
    front: list[Part] = [Input(shape)]
    for wanted in stages or ():
        if wanted == "M":
            front.append(_pool())
            continue
        filters = check_count('each of channels but "M"', wanted, 1)
        front.append(new.conv(now, filters, (3, 3), (1, 1), normalised=normalised))
        if normalised:
            front.append(new.batch_norm(filters))
        now = filters
    widths = [check_count("each of hidden", n, 1) for n in units or ()]
    with naming("vgg"):
        return _with_dense([*front, Flatten("")], new, (*widths, check_count("classes", classes, 1)), engine)


def glorot_uniform(rng: np.random.Generator, n_out: int, n_in: int, *kernel: int) -> Float:
    """Return (out, in, kernel...) weights uniform in ±√(6 / ((in + out)·places)) (Glorot & Bengio 2010)."""
    limit = math.sqrt(6 / ((n_in + n_out) * math.prod(kernel)))
    return rng.uniform(-limit, limit, (n_out, n_in, *kernel)).astype(np.float32)


class _New:
    """Draws the weights of new parts, one after the other; their names come with ``numbered``."""

    def __init__(self, activation: str, seed: int) -> None:
        if activation not in ACTIVATIONS:
            raise InvalidInput(f"activation must be one of {', '.join(ACTIVATIONS)}, not {shown(activation)}")
        self.activation = activation
        self._rng = np.random.default_rng(check_count("seed", seed, 0))

    def dense(self, widths: Sequence[int]) -> list[Part]:
        """Return the dense layers between these widths; the last has no activation."""
        parts: list[Part] = []
        for place, (n_in, n_out) in enumerate(itertools.pairwise(widths), start=2):
            weight, mask, bias = self._arrays(n_out, n_in)
            parts.append(Layer("", weight, mask, bias, "identity" if place == len(widths) else self.activation))
        return parts

    def conv(
        self, n_in: int, n_out: int, kernel: Pair, padding: Pair = (0, 0), *, normalised: bool = False
    ) -> ConvLayer:
        """Return a convolution; one whose outputs are ``normalised`` has neither bias nor activation."""
        weight, mask, bias = self._arrays(n_out, n_in, *kernel)
        if normalised:
            return ConvLayer("", weight, mask, None, "identity", padding=padding)
        return ConvLayer("", weight, mask, bias, self.activation, padding=padding)

    def batch_norm(self, channels: int) -> BatchNorm:
        """Return batch normalisation that changes nothing yet."""
        zeros, ones = np.zeros(channels, np.float32), np.ones(channels, np.float32)
        return BatchNorm("", ones, zeros, zeros, ones, self.activation)

    def _arrays(self, n_out: int, n_in: int, *kernel: int) -> tuple[Float, npt.NDArray[np.bool_], Float]:
        weight = glorot_uniform(self._rng, n_out, n_in, *kernel)
        return weight, np.ones(weight.shape, bool), np.zeros(n_out, np.float32)


def _pool() -> Pool:
    return Pool("", "max", (2, 2), (2, 2))


def _with_dense(front: Sequence[Part], new: _New, widths: Sequence[int], engine: str) -> Network:
    """Return a network of these parts, the last of which flattens, and dense layers of these widths."""
    features = shapes_after(numbered(front))[-1][0]
    return build(numbered([*front, *new.dense((features, *widths))]), engine)
