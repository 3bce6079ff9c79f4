"""Between lists of parts and torch's modules and tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from ..parts import BatchNorm, Bool, ConvLayer, Flatten, Input, Layer, Part, Pool, arrays, with_arrays

ACTIVATION_MODULES: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
"""The module of each activation; "identity" has none."""

PrunableModule = nn.Linear | nn.Conv2d


def sequential(parts: Sequence[Part]) -> nn.Sequential:
    """Return a plain ``nn.Sequential`` with copies of the parts' arrays, without their masks, in training mode.

    ``Input`` has no module: images are (samples, channels, height, width). torch's random state is left alone.
    """
    return nn.Sequential(*(module for _, modules in by_part(parts) for module in modules))


def by_part(parts: Sequence[Part]) -> Iterator[tuple[Part, list[nn.Module]]]:
    """Yield each part with its modules in what ``sequential`` makes: one of its own, and its activation's."""
    images = bool(parts) and isinstance(parts[0], Input)
    for part in parts:
        images = images and not isinstance(part, Flatten)
        activation = ACTIVATION_MODULES.get(getattr(part, "activation", "identity"))
        yield part, [*_own(part, images), *([] if activation is None else [activation()])]


def _own(part: Part, images: bool) -> list[nn.Module]:
    match part:
        case Input():
            return []
        case Layer():
            return [_layer(part)]
        case BatchNorm():
            kind = nn.BatchNorm2d if images else nn.BatchNorm1d
            norm = kind(len(part.weight), part.epsilon, part.momentum)
            norm.weight, norm.bias = nn.Parameter(_copy(part.weight)), nn.Parameter(_copy(part.bias))
            norm.running_mean, norm.running_var = _copy(part.mean), _copy(part.variance)
            return [norm]
        case Pool():
            pool = nn.MaxPool2d if part.kind == "max" else nn.AvgPool2d
            return [pool(part.size, part.stride, part.padding)]
        case Flatten():
            return [nn.Flatten()]


def _layer(layer: Layer) -> PrunableModule:
    outputs, inputs, *kernel = layer.weight.shape
    bias = layer.bias is not None
    module: PrunableModule
    if isinstance(layer, ConvLayer):
        height, width = kernel
        geometry = (layer.stride, layer.padding, layer.dilation)
        module = nn.Conv2d(inputs, outputs, (height, width), *geometry, bias=bias, device="meta")
    else:
        module = nn.Linear(inputs, outputs, bias=bias, device="meta")
    module.weight = nn.Parameter(_copy(layer.weight))
    if layer.bias is not None:
        module.bias = nn.Parameter(_copy(layer.bias))
    return module


def _copy(array: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(array, order="C"))


def prunable_modules(module: nn.Sequential) -> list[PrunableModule]:
    """Return the linear modules and convolutions of what ``sequential`` made, in order."""
    return [part for part in module if isinstance(part, PrunableModule)]


def mask_weight(module: PrunableModule, mask: Bool) -> None:
    """Put a copy of a mask, of the weight's shape, on a module with ``torch.nn.utils.prune.custom_from_mask``.

    From then on ``weight`` is ``weight_orig``, a parameter, times ``weight_mask``, a float32 buffer.
    """
    prune.custom_from_mask(module, "weight", torch.tensor(mask.copy()))  # type: ignore[no-untyped-call]


def views(parts: Sequence[Part], module: nn.Sequential) -> list[Part]:
    """Return the parts with NumPy views of the arrays of what ``sequential`` made of them, masked since."""
    holders = (own for own in module if isinstance(own, PrunableModule | nn.BatchNorm1d | nn.BatchNorm2d))
    return [_view(part, next(holders)) if arrays(part) else part for part in parts]


def _view(part: Part, module: nn.Module) -> Part:
    names = _LAYER if isinstance(part, Layer) else _BATCH_NORM
    found = {name: getattr(module, names[name]).detach().numpy() for name in arrays(part)}
    return with_arrays(part, found)


_LAYER = {"weight": "weight_orig", "mask": "weight_mask", "bias": "bias"}
_BATCH_NORM = {"weight": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}
"""What modules call the arrays of parts."""


def tensor(array: npt.NDArray[Any]) -> Tensor:
    """Return a tensor on the array's memory, which nothing here writes to: torch's warning does not apply."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array if min(array.strides, default=0) >= 0 else array.copy())
