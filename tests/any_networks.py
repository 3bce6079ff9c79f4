"""Networks of every kind of part, small, at random."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from hypothesis import strategies as st

from pyflux_prune.engines.parts import (
    ACTIVATIONS,
    BatchNorm,
    ConvLayer,
    Flatten,
    Float,
    Input,
    Layer,
    Part,
    Pool,
    after,
    arrays,
    input_shape,
    numbered,
)
from pyflux_prune.errors import InvalidInput


def layer(rng: np.random.Generator, shape: Sequence[int], activation: str, bias: bool, density: float) -> Layer:
    mask = rng.random(shape) < density
    weight = rng.normal(size=shape).astype(np.float32) * mask
    return Layer("", weight, mask, rng.normal(size=shape[0]).astype(np.float32) if bias else None, activation)


def norm(rng: np.random.Generator, channels: int, activation: str) -> BatchNorm:
    weight, bias, mean, variance = rng.random((4, channels), np.float32)
    return BatchNorm("", weight, bias - 0.5, mean - 0.5, variance + 0.1, activation, 1e-3, 0.25)


@st.composite
def networks(draw: st.DrawFn, *, images: bool | None = None) -> list[Part]:
    """Return networks of vectors or images; no part is without a chance."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    activations, pairs = st.sampled_from(ACTIVATIONS), st.tuples(st.integers(1, 3), st.integers(1, 3))
    densities = st.sampled_from([0.3, 1.0])
    if images is None:
        images = draw(st.booleans())
    shape: tuple[int, ...] = tuple(draw(st.tuples(*[st.integers(1, n) for n in (3, 9, 9)]))) if images else (5,)
    parts: list[Part] = [Input(shape)] if len(shape) == 3 else []  # type: ignore[arg-type]
    for kind in draw(st.lists(st.sampled_from(["layer", "layer", "norm", "pool"]), max_size=5)) if images else ():
        part: Part
        if kind == "layer":
            weight = (draw(st.integers(1, 4)), shape[0], *draw(pairs))
            made = layer(rng, weight, draw(activations), draw(st.booleans()), draw(densities))
            padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
            part = ConvLayer(**vars(made), stride=draw(pairs), padding=padding, dilation=draw(pairs))
        elif kind == "norm":
            part = norm(rng, shape[0], draw(activations))
        else:
            size = draw(pairs)
            most = [st.integers(0, n // 2) for n in size]
            part = Pool("", draw(st.sampled_from(["max", "mean"])), size, draw(pairs), draw(st.tuples(*most)))
        with suppress(InvalidInput):  # it does not fit
            shape = after(part, shape, "")
            parts.append(part)
    if images:
        parts.append(Flatten(""))
        shape = after(parts[-1], shape, "")
    for width in draw(st.lists(st.integers(1, 6), max_size=2)):
        parts.append(layer(rng, (width, *shape), draw(activations), draw(st.booleans()), draw(densities)))
        shape = (width,)
        if draw(st.booleans()):
            parts.append(norm(rng, width, draw(activations)))
    return numbered([*parts, layer(rng, (3, *shape), "identity", draw(st.booleans()), draw(densities))])


def samples(parts: Sequence[Part], n: int = 4) -> Float:
    return np.random.default_rng(1).normal(size=(n, *input_shape(parts))).astype(np.float32)


def assert_same(some: Sequence[Part], others: Sequence[Part]) -> None:
    """Both have the same arrays, and the same of everything else."""
    for one, other in zip(some, others, strict=True):
        assert type(one) is type(other)
        mine, theirs = arrays(one), arrays(other)
        assert mine.keys() == theirs.keys()
        for name, array in mine.items():
            np.testing.assert_array_equal(array, theirs[name])
            assert array.dtype == theirs[name].dtype
        plain, others_plain = ({k: v for k, v in vars(p).items() if k not in mine} for p in (one, other))
        assert plain == others_plain
