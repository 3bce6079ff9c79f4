"""Between PyTorch's modules and state dicts and lists of parts; everything is copied, nothing shared.

Weights are float32 on both sides: other precisions are refused rather than rounded in silence.

Raises:
    EngineUnavailable: on import, where PyTorch is missing.

"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .choices import shown
from .datasets import check_shape
from .engines.parts import (
    ACTIVATIONS,
    BatchNorm,
    Bool,
    ConvLayer,
    Flatten,
    Float,
    Input,
    Layer,
    Pair,
    Part,
    Pool,
    after,
    numbered,
    prunable,
)
from .engines.torch import ACTIVATION_MODULES, mask_weight, prunable_modules, sequential
from .errors import InvalidInput
from .files import StrPath, atomic_write, check_parts, naming, read_bytes, to_path

# isort: split
# After engines.torch, which says what to do where torch is missing.
import torch
from torch import Tensor, nn

_ACTIVATION_NAMES: dict[type, str] = {module: name for name, module in ACTIVATION_MODULES.items()}


def parts_from_module(module: nn.Module, input_shape: Sequence[int] | None = None) -> list[Part]:
    """Return the parts of an ``nn.Sequential``, which compute what it does in eval mode.

    Nested Sequentials are flattened; ``Identity``, and ``Flatten`` of what is flat, are passed over. Weights
    pruned with ``torch.nn.utils.prune`` come with their masks. A module that occurs twice becomes two parts.

    Args:
        module: of ``Linear``, ``Conv2d`` and batch normalisation, each with or without an activation after it,
            pooling, ``Flatten`` and ``Identity``.
        input_shape: (channels, height, width) of a sample; None for vectors.

    Raises:
        InvalidInput: another module, or one with options that parts do not have, an activation in another place,
            a pruned bias, values that are not finite float32, or shapes that do not fit; the message names the
            place, as in ``module[1][0]``.

    """
    parts: list[Part] = []
    shape: tuple[int, ...] | None = None
    before = "input_shape"
    if input_shape is not None:
        first = Input(check_shape("input_shape", input_shape))
        parts, shape = [first], first.shape
    for where, step in _flatten("module", module):
        if type(step) in _ACTIVATION_NAMES:
            parts[-1:] = [_activated(where, step, parts[-1] if parts else None)]
        elif (part := _read(where, step, shape)) is not None:
            shape = _after(part, shape, before)
            parts.append(part)
            before = where
    if not prunable(parts):
        raise InvalidInput("there must be at least one Linear, but there is none")
    named = numbered(parts)
    with naming("module"):
        check_parts(named)
    return named


def _read(where: str, module: object, shape: tuple[int, ...] | None) -> Part | None:
    """Return the part that a module is, given the shape it takes, called ``where``; None if it does nothing."""
    if type(module) not in _READERS:
        known = ", ".join(kind.__name__ for kind in (*_READERS, *_ACTIVATION_NAMES))
        hint = "; leave it out: it does nothing in eval mode, and training here has none"
        raise InvalidInput(
            f"{where} is {type(module).__name__}, but only {known} and Identity will do"
            + (hint if isinstance(module, nn.modules.dropout._DropoutNd) else "")
        )
    if shape is None and type(module) in _OF_IMAGES:
        raise InvalidInput(f"{where} is {type(module).__name__}: give input_shape, (channels, height, width)")
    return _READERS[type(module)](where, module, shape or ())


def _after(part: Part, shape: tuple[int, ...] | None, before: str) -> tuple[int, ...]:
    """Return the shape of a sample after a part; the first of a network of vectors takes what it can."""
    if shape is None:
        assert isinstance(part, Layer | BatchNorm), "others need input_shape"
        shape = part.weight.shape[-1:]
    if type(part) is Layer and len(shape) == 1:
        _check_width(part.name, part.weight, shape[0])
    return after(part, shape, before)


def _activated(where: str, activation: object, part: Part | None) -> Part:
    """Return the part before an activation with it."""
    if isinstance(part, Layer | BatchNorm) and part.activation == "identity":
        return replace(part, activation=_ACTIVATION_NAMES[type(activation)])
    hint = "; before max pooling it does the same" if isinstance(part, Pool) and part.kind == "max" else ""
    raise InvalidInput(
        f"{where} is {type(activation).__name__}, but an activation must follow a Linear, a Conv2d or batch "
        f"normalisation{hint}"
    )


def _linear(where: str, module: Any, shape: tuple[int, ...]) -> Part:
    return Layer(where, *_arrays(where, module.state_dict()), "identity")


def _convolution(where: str, module: Any, shape: tuple[int, ...]) -> Part:
    _only(where, module, groups=1, padding_mode="zeros")
    stride, dilation = _pair(module.stride), _pair(module.dilation)
    if module.padding == "same":
        sums = [d * (k - 1) for k, d in zip(module.kernel_size, dilation, strict=True)]
        if any(n % 2 for n in sums):
            sizes = f"kernel_size={module.kernel_size} and dilation={module.dilation}"
            raise InvalidInput(f"{where} has padding='same', which with {sizes} differs between the sides")
        padding = (sums[0] // 2, sums[1] // 2)
    else:
        padding = (0, 0) if module.padding == "valid" else _pair(module.padding)
    return ConvLayer(
        where, *_arrays(where, module.state_dict(), kernel=True), "identity", stride, padding, dilation
    )


def _batch_norm(where: str, module: Any, shape: tuple[int, ...]) -> Part | None:
    _only(where, module, affine=True, track_running_stats=True)
    if module.momentum is None:
        raise InvalidInput(f"{where} has momentum=None, but only a number will do")
    if len(shape) == (1 if isinstance(module, nn.BatchNorm2d) else 3):
        raise InvalidInput(f"{where} is {type(module).__name__}, but what comes to it has the shape {shape}")
    tensors = module.state_dict()
    names = ("weight", "bias", "running_mean", "running_var")
    if tensors.keys() - {"num_batches_tracked"} != set(names):
        raise InvalidInput(f"{where} must hold {', '.join(names)}, not {', '.join(sorted(tensors))}")
    weight, bias, mean, variance = (
        _finite(where, name, _values(where, name, tensors)).clone().numpy() for name in names
    )
    return BatchNorm(
        where, weight, bias, mean, variance, epsilon=float(module.eps), momentum=float(module.momentum)
    )


def _max_pool(where: str, module: Any, shape: tuple[int, ...]) -> Part:
    dilation = 1 if module.dilation in (1, (1, 1)) else module.dilation
    if dilation != 1:
        raise InvalidInput(f"{where} has dilation={dilation}, but only dilation=1 will do")
    _only(where, module, ceil_mode=False, return_indices=False)
    return Pool(where, "max", _pair(module.kernel_size), _pair(module.stride), _pair(module.padding))


def _mean_pool(where: str, module: Any, shape: tuple[int, ...]) -> Part:
    _only(where, module, ceil_mode=False, divisor_override=None)
    padding = _pair(module.padding)
    if padding != (0, 0):
        _only(where, module, count_include_pad=True)
    return Pool(where, "mean", _pair(module.kernel_size), _pair(module.stride), padding)


def _adaptive_pool(where: str, module: Any, shape: tuple[int, ...]) -> Part | None:
    """Return the mean pooling whose windows are those of an adaptive one; torch says where these are."""
    if len(shape) != 3:
        raise InvalidInput(f"{where} is AdaptiveAvgPool2d, but what comes to it has the shape {shape}")
    given = module.output_size
    wanted = given if isinstance(given, tuple) else (given, given)
    outputs = [n if w is None else w for n, w in zip(shape[1:], wanted, strict=True)]
    windows = [_windows(n, w) for n, w in zip(shape[1:], outputs, strict=True)]
    if None in windows:
        raise InvalidInput(
            f"{where} is AdaptiveAvgPool2d to {tuple(outputs)} of {shape}, but its windows must be all alike"
        )
    (height, width), (down, right) = zip(*(window for window in windows if window), strict=True)
    return None if tuple(outputs) == shape[1:] else Pool(where, "mean", (height, width), (down, right))


def _windows(length: int, count: int) -> tuple[int, int] | None:
    """Return size and distance of ``count`` windows over a length, or None where they differ."""
    starts = [i * length // count for i in range(count)]
    ends = [-(-(i + 1) * length // count) for i in range(count)]
    sizes = {end - start for start, end in zip(starts, ends, strict=True)}
    distances = {b - a for a, b in itertools.pairwise(starts)} or {length}
    return (sizes.pop(), distances.pop()) if len(sizes) == len(distances) == 1 and 0 not in distances else None


def _flat(where: str, module: Any, shape: tuple[int, ...]) -> Part | None:
    _only(where, module, start_dim=1, end_dim=-1)
    return Flatten(where) if len(shape) == 3 else None


_READERS: dict[type, Callable[[str, Any, tuple[int, ...]], Part | None]] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _mean_pool,
    nn.AdaptiveAvgPool2d: _adaptive_pool,
    nn.Flatten: _flat,
}
"""What makes a part of a module, given its place and the shape of what comes to it, () where that is unknown."""

_OF_IMAGES = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


def _only(where: str, module: Any, **allowed: object) -> None:
    for name, value in allowed.items():
        if (given := getattr(module, name)) != value:
            raise InvalidInput(f"{where} has {name}={given!r}, but only {name}={value!r} will do")


def _pair(value: Any) -> Pair:
    height, width = value if isinstance(value, tuple | list) and len(value) == 2 else (value, value)
    return int(height), int(width)


def layers_from_state_dict(state_dict: Mapping[str, Tensor], *, activation: str | None) -> list[Layer]:
    """Return the layers that the state dict of an ``nn.Sequential`` describes, in the order of its numbers.

    Args:
        state_dict: ``"0.weight"`` (out, in) or ``"0.weight_orig"`` and ``"0.weight_mask"``, and perhaps
            ``"0.bias"`` (out,), and so on; the number may be a path, as in ``"1.0.weight"``.
        activation: the activation between the layers, which a state dict does not tell; the last has none.

    Raises:
        InvalidInput: an unknown activation, another key, a convolution, a pruned bias, values that are not finite
            float32, or shapes that do not fit.

    """
    if activation not in ACTIVATIONS:
        raise InvalidInput(f"activation must be one of {', '.join(ACTIVATIONS)}, not {shown(activation)}")
    modules: dict[tuple[int, ...], dict[str, object]] = {}
    for key, tensor in state_dict.items():
        parts = re.fullmatch(r"(\d+(?:\.\d+)*)\.(\w+)", str(key))
        if parts is None:
            raise InvalidInput(f"state_dict: keys must be as in an nn.Sequential ('0.weight'), not {shown(key)}")
        modules.setdefault(tuple(map(int, parts[1].split("."))), {})[parts[2]] = tensor
    layers: list[Layer] = []
    for place, tensors in sorted(modules.items()):
        where = f"layer {'.'.join(map(str, place))}"
        if any(isinstance(t, Tensor) and t.ndim == 4 for t in tensors.values()):
            raise InvalidInput(
                f"{where} is a convolution, and a state dict does not tell its stride: give the module"
            )
        arrays = _arrays(where, tensors)
        if layers:
            _check_width(where, arrays[0], len(layers[-1].weight))
        layers.append(Layer("", *arrays, "identity" if place == max(modules) else activation))
    if not layers:
        raise InvalidInput("there must be at least one Linear, but there is none")
    return prunable(numbered(layers))


def module_from_parts(parts: Sequence[Part]) -> nn.Sequential:
    """Return an ``nn.Sequential`` of these parts; the pruned ones are pruned with ``torch.nn.utils.prune``.

    A layer without a pruned weight has a plain ``weight``; another has ``weight_orig`` and ``weight_mask``. The
    module is in eval mode, and takes images as (samples, channels, height, width).
    """
    module = sequential(parts).eval()
    for layer, own in zip(prunable(parts), prunable_modules(module), strict=True):
        if not layer.mask.all():
            mask_weight(own, layer.mask)
    return module


def state_dict_from_parts(parts: Sequence[Part]) -> dict[str, Tensor]:
    """Return the state dict of ``module_from_parts(parts)``."""
    return module_from_parts(parts).state_dict()


def read_state_dict(path: StrPath, *, activation: str | None) -> list[Layer]:
    """Return the layers of a state dict that ``torch.save`` wrote; nothing in the file is executed.

    Raises:
        InvalidInput: the file cannot be read or holds no state dict, or what ``layers_from_state_dict`` raises.

    """
    data = read_bytes(to_path(path))
    try:
        state_dict = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load documents none, and damaged files meet many
        raise InvalidInput(f"{path} is not a PyTorch file of weights only") from error
    if not isinstance(state_dict, Mapping) or not all(isinstance(key, str) for key in state_dict):
        raise InvalidInput(f"{path} must hold a state dict, not {type(state_dict).__name__}")
    with naming(path):
        return layers_from_state_dict(state_dict, activation=activation)


def write_state_dict(path: StrPath, parts: Sequence[Part]) -> None:
    """Write the state dict of ``module_from_parts(parts)`` for ``torch.load``, atomically.

    Raises:
        InvalidInput: the file cannot be written.

    """
    data = io.BytesIO()
    torch.save(state_dict_from_parts(parts), data)
    atomic_write(path, data.getvalue())


def _flatten(where: str, module: object) -> Iterator[tuple[str, object]]:
    """Yield the parts of nested Sequentials; unlike ``named_children``, twice where they occur twice."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for place, part in enumerate(module):
            yield from _flatten(f"{where}[{place}]", part)
    elif type(module) is not nn.Identity:
        yield where, module


def _check_width(where: str, weight: Float, inputs: int) -> None:
    if weight.shape[1] != inputs:
        raise InvalidInput(f"{where} takes {weight.shape[1]} inputs, but the layer before gives {inputs}")


def _arrays(
    where: str, tensors: Mapping[str, object], *, kernel: bool = False
) -> tuple[Float, Bool, Float | None]:
    """Return copies of the weight, mask and bias in the state of one ``Linear`` or ``Conv2d``."""
    if "bias_orig" in tensors:
        raise InvalidInput(f"{where} has a pruned bias: undo it with torch.nn.utils.prune.remove")
    names = tensors.keys() - {"bias"}
    if names == {"weight"}:
        weight = _values(where, "weight", tensors)
        mask = torch.ones_like(weight)
    elif names == {"weight_orig", "weight_mask"}:
        weight = _values(where, "weight_orig", tensors)
        mask = _values(where, "weight_mask", tensors, torch.bool)
    else:
        raise InvalidInput(
            f"{where} must hold weight, or weight_orig and weight_mask, and perhaps bias, "
            f"not {', '.join(sorted(tensors))}"
        )
    bias = _values(where, "bias", tensors) if "bias" in tensors else None
    fit = mask.shape == weight.shape and (bias is None or bias.shape == weight.shape[:1])
    if weight.ndim != (4 if kernel else 2) or not weight.numel() or not fit:
        shapes = [tuple(tensor.shape) for tensor in (weight, mask, bias) if tensor is not None]
        axes = "out, in, height, width" if kernel else "out, in"
        raise InvalidInput(f"{where} must have a weight and mask ({axes}) and a bias (out,), not {shapes}")
    keep = mask != 0
    weight = torch.where(keep, weight * mask, 0.0)  # the product alone would keep a NaN that is pruned
    _finite(where, "weight", weight)
    return weight.numpy(), keep.numpy(), None if bias is None else _finite(where, "bias", bias).clone().numpy()


def _finite(where: str, name: str, tensor: Tensor) -> Tensor:
    if not tensor.isfinite().all():
        raise InvalidInput(f"{where}.{name} must be finite, but holds NaN or infinity")
    return tensor


def _values(where: str, name: str, tensors: Mapping[str, object], *others: torch.dtype) -> Tensor:
    """Return a tensor's values on the CPU; they must be dense and float32, or of one of the other types."""
    tensor = tensors[name]
    if not isinstance(tensor, Tensor):
        raise InvalidInput(f"{where}.{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.dtype not in (torch.float32, *others):
        raise InvalidInput(f"{where}.{name} must be float32, not {tensor.dtype}: convert with .float()")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise InvalidInput(f"{where}.{name} must be a dense tensor, not {tensor.layout} on {tensor.device}")
    return tensor.detach().cpu()
