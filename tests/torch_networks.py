"""Small networks for the tests of the reference engine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from pyflux_prune.choices import Global, Magnitude, Sparsity
from pyflux_prune.engines.parts import BatchNorm, Bool, ConvLayer, Flatten, Float, Input, Int, Layer, Part, Pool
from pyflux_prune.engines.parts import arrays as part_arrays
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


def build(parts: Sequence[Part]) -> TorchModel:
    return TorchEngine().build(parts)


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


# --- images ----------------------------------------------------------------------------------------------

IMAGE = (2, 6, 6)
ACTIVATIONS = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}


def image_module(seed: int = 0, density: float = 1.0) -> nn.Sequential:
    """A network with everything in it, in evaluation mode."""
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d((2, 2), (2, 2), (0, 0)),
        nn.Conv2d(4, 4, (2, 1), stride=(1, 2), dilation=(2, 1), padding=(1, 0), bias=False),
        nn.Tanh(),
        nn.AvgPool2d((2, 2), (1, 1), (1, 1)),
        nn.Flatten(),
        nn.Linear(48, 6),
        nn.BatchNorm1d(6, eps=1e-3, momentum=0.3),
        nn.Sigmoid(),
        nn.Linear(6, 3),
    )
    return randomised(module, density)


def randomised(module: nn.Sequential, density: float = 1.0) -> nn.Sequential:
    """The module in evaluation mode with random statistics of batches, and masks of random weights."""
    for part in module:
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            for values, low in (
                (part.weight, -1),
                (part.bias, -1),
                (part.running_mean, -1),
                (part.running_var, 0.5),
            ):
                nn.init.uniform_(values, low, 1.5)
        elif isinstance(part, nn.Linear | nn.Conv2d):
            prune.custom_from_mask(part, "weight", torch.rand(part.weight.shape) < density)
    return module.eval()


def parts_of(module: nn.Sequential, shape: tuple[int, int, int] = IMAGE) -> list[Part]:
    """The parts that a masked module is made of, read from torch's own attributes."""
    parts: list[Any] = [Input(shape)]
    for place, own in enumerate(module):
        name, state = str(place), {key: value.numpy() for key, value in own.state_dict().items()}
        if isinstance(own, nn.Conv2d | nn.Linear):
            kind, geometry = Layer, {}
            if isinstance(own, nn.Conv2d):
                kind, geometry = ConvLayer, {key: getattr(own, key) for key in ("stride", "padding", "dilation")}
            mask = state["weight_mask"].astype(bool)
            weight = state["weight_orig"] * mask
            parts.append(kind(name, weight, mask, state.get("bias"), "identity", **geometry))
        elif isinstance(own, nn.BatchNorm1d | nn.BatchNorm2d):
            values = (state[key] for key in ("weight", "bias", "running_mean", "running_var"))
            parts.append(BatchNorm(name, *values, "identity", own.eps, own.momentum))
        elif isinstance(own, nn.MaxPool2d | nn.AvgPool2d):
            size, stride, padding = (_pair(value) for value in (own.kernel_size, own.stride, own.padding))
            parts.append(Pool(name, "max" if isinstance(own, nn.MaxPool2d) else "mean", size, stride, padding))
        elif isinstance(own, nn.Flatten):
            parts.append(Flatten(name))
        else:
            parts[-1] = replace(parts[-1], activation=ACTIVATIONS[type(own)])
    return parts


def _pair(value: Any) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def make_images(samples: int = 40, shape: tuple[int, int, int] = IMAGE) -> tuple[Float, Int]:
    """Images as they cross to engines, flattened, and labels of three classes."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(samples, math.prod(shape))).astype(np.float32)
    return x, np.arange(samples) % 3


def images(x: Float, shape: tuple[int, int, int] = IMAGE) -> Tensor:
    return torch.from_numpy(x).view(-1, *shape)


def all_arrays(model: TorchModel) -> list[Any]:
    return [np.array(array) for part in model.parts() for array in part_arrays(part).values()]
