"""Small networks for the tests of the reference engine."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pyflux_prune.choices import Global, Magnitude, Sparsity
from pyflux_prune.engines.parts import Bool, Float, Int, Layer
from pyflux_prune.engines.torch import TorchEngine, TorchModel

WIDTHS = (7, 6, 5, 3)


def make_layers(widths: Sequence[int] = WIDTHS, activation: str = "tanh", bias: bool = True) -> list[Layer]:
    rng = np.random.default_rng(0)
    layers = []
    for place, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        weight = rng.normal(size=(outputs, inputs)).astype(np.float32)
        layers.append(
            Layer(
                name=str(2 * place),
                weight=weight,
                mask=np.ones(weight.shape, bool),
                bias=rng.normal(size=outputs).astype(np.float32) if bias else None,
                activation="identity" if place == len(widths) - 2 else activation,
            )
        )
    return layers


def with_weights(layers: Sequence[Layer], values: npt.NDArray[Any]) -> list[Layer]:
    """The layers with these values as weights, taken in the order layer, output, input."""
    parts = np.split(values.astype(np.float32), np.cumsum([layer.weight.size for layer in layers])[:-1])
    return [
        replace(layer, weight=part.reshape(layer.weight.shape)) for layer, part in zip(layers, parts, strict=True)
    ]


def make_data(samples: int = 40) -> tuple[Float, Int]:
    rng = np.random.default_rng(1)
    return rng.normal(size=(samples, WIDTHS[0])).astype(np.float32), rng.integers(0, WIDTHS[-1], samples)


def build(layers: Sequence[Layer]) -> TorchModel:
    return TorchEngine().build(layers)


def pruned_model(sparsity: Sparsity = 0.5, **options: Any) -> TorchModel:
    model = build(make_layers(**options))
    model.prune(Magnitude(), sparsity, Global())
    return model


def plant_nan(model: TorchModel) -> None:
    for layer in model.layers():
        layer.weight[~layer.mask] = np.nan


def arrays(model: TorchModel) -> list[Any]:
    return [np.array(a) for layer in model.layers() for a in (layer.weight, layer.mask, layer.bias)]


def assert_same(before: Sequence[Any], after: Sequence[Any]) -> None:
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def assert_close(actual: object, expected: object, rtol: float, atol: float = 0.0) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=atol)


def assert_pruned_are_zero(model: TorchModel) -> None:
    for layer in model.layers():
        assert not layer.weight[~layer.mask].any()


def flat_masks(model: TorchModel) -> Bool:
    return np.concatenate([layer.mask.ravel() for layer in model.layers()])
