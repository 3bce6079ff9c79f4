"""Between PyTorch's modules and state dicts and lists of ``Layer``; everything is copied, nothing shared.

Weights are float32 on both sides: other precisions are refused rather than rounded in silence.

Raises:
    EngineUnavailable: on import, where PyTorch is missing.

"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence

from .engines.parts import ACTIVATIONS, Bool, Float, Layer, layer_names
from .engines.torch import ACTIVATION_MODULES, mask_weight, prunable_modules, sequential
from .errors import InvalidInput
from .files import StrPath, atomic_write, naming, read_bytes, to_path

# isort: split
# After engines.torch, which says what to do where torch is missing.
import torch
from torch import Tensor, nn

_ACTIVATION_NAMES: dict[type, str] = {module: name for name, module in ACTIVATION_MODULES.items()}


def layers_from_module(module: nn.Module) -> list[Layer]:
    """Return the layers of an ``nn.Sequential`` of ``Linear``, ``ReLU``, ``Tanh``, ``Sigmoid``, ``Identity``.

    Nested Sequentials are flattened, and ``Identity`` is passed over. Weights pruned with
    ``torch.nn.utils.prune`` come with their masks. A ``Linear`` that occurs twice becomes two layers.

    Raises:
        InvalidInput: another module, an activation that does not follow a ``Linear``, a pruned bias, values
            that are not finite float32, or widths that do not fit; the message names the place, as in
            ``module[1][0]``.

    """
    dense: list[tuple[str, Mapping[str, object]]] = []
    activations: list[str] = []
    for where, part in _flatten("module", module):
        if type(part) is nn.Linear:
            dense.append((where, part.state_dict()))
            activations.append("identity")
        elif type(part) not in _ACTIVATION_NAMES:
            raise InvalidInput(
                f"{where} is {type(part).__name__}, but only Linear, ReLU, Tanh, Sigmoid and Identity will do"
            )
        elif not activations or activations[-1] != "identity":
            raise InvalidInput(f"{where} is {type(part).__name__}, but an activation must follow a Linear")
        else:
            activations[-1] = _ACTIVATION_NAMES[type(part)]
    return _layers(dense, activations)


def layers_from_state_dict(state_dict: Mapping[str, Tensor], *, activation: str | None) -> list[Layer]:
    """Return the layers that the state dict of an ``nn.Sequential`` describes, in the order of its numbers.

    Args:
        state_dict: ``"0.weight"`` (out, in) or ``"0.weight_orig"`` and ``"0.weight_mask"``, and perhaps
            ``"0.bias"`` (out,), and so on; the number may be a path, as in ``"1.0.weight"``.
        activation: the activation between the layers, which a state dict does not tell; the last has none.

    Raises:
        InvalidInput: an unknown activation, another key, a pruned bias, values that are not finite float32,
            or shapes that do not fit.

    """
    if activation not in ACTIVATIONS:
        raise InvalidInput(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    modules: dict[tuple[int, ...], dict[str, object]] = {}
    for key, tensor in state_dict.items():
        parts = re.fullmatch(r"(\d+(?:\.\d+)*)\.(\w+)", str(key))
        if parts is None:
            raise InvalidInput(f"state_dict: keys must be as in an nn.Sequential ('0.weight'), not {key!r}")
        modules.setdefault(tuple(map(int, parts[1].split("."))), {})[parts[2]] = tensor
    dense = [(f"layer {'.'.join(map(str, place))}", modules[place]) for place in sorted(modules)]
    return _layers(dense, [activation] * (len(dense) - 1) + ["identity"])


def module_from_layers(layers: Sequence[Layer]) -> nn.Sequential:
    """Return an ``nn.Sequential`` of these layers; the pruned ones are pruned with ``torch.nn.utils.prune``.

    A layer without a pruned weight has a plain ``weight``; another has ``weight_orig`` and ``weight_mask``.
    """
    module = sequential(layers)
    for layer, part in zip(layers, prunable_modules(module), strict=True):
        if not layer.mask.all():
            mask_weight(part, layer.mask)
    return module


def state_dict_from_layers(layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Return the state dict of ``module_from_layers(layers)``."""
    return module_from_layers(layers).state_dict()


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


def write_state_dict(path: StrPath, layers: Sequence[Layer]) -> None:
    """Write the state dict of ``module_from_layers(layers)`` for ``torch.load``, atomically.

    Raises:
        InvalidInput: the file cannot be written.

    """
    data = io.BytesIO()
    torch.save(state_dict_from_layers(layers), data)
    atomic_write(path, data.getvalue())


def _flatten(where: str, module: object) -> Iterator[tuple[str, object]]:
    """Yield the parts of nested Sequentials; unlike ``named_children``, twice where they occur twice."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for place, part in enumerate(module):
            yield from _flatten(f"{where}[{place}]", part)
    elif type(module) is not nn.Identity:
        yield where, module


def _layers(dense: Sequence[tuple[str, Mapping[str, object]]], activations: Sequence[str]) -> list[Layer]:
    """Return the layers with these tensors and activations, named as ``module_from_layers`` places them."""
    if not dense:
        raise InvalidInput("there must be at least one Linear, but there is none")
    layers: list[Layer] = []
    for (where, tensors), activation, name in zip(dense, activations, layer_names(activations), strict=True):
        weight, mask, bias = _arrays(where, tensors)
        if layers and weight.shape[1] != len(layers[-1].weight):
            raise InvalidInput(
                f"{where} takes {weight.shape[1]} inputs, but the layer before gives {len(layers[-1].weight)}"
            )
        layers.append(Layer(name, weight, mask, bias, activation))
    return layers


def _arrays(where: str, tensors: Mapping[str, object]) -> tuple[Float, Bool, Float | None]:
    """Return copies of the weight, mask and bias in the state of one ``Linear``."""
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
    if weight.ndim != 2 or not weight.numel() or not fit:
        shapes = [tuple(tensor.shape) for tensor in (weight, mask, bias) if tensor is not None]
        raise InvalidInput(f"{where} must have a weight and mask (out, in) and a bias (out,), not {shapes}")
    keep = mask != 0
    weight = torch.where(keep, weight * mask, 0.0)  # the product alone would keep a NaN that is pruned
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.isfinite().all():
            raise InvalidInput(f"{where}.{name} must be finite, but holds NaN or infinity")
    return weight.numpy(), keep.numpy(), None if bias is None else bias.clone().numpy()


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
