"""Between lists of ``Layer`` and torch's modules and tensors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from ..parts import Bool, Layer

ACTIVATION_MODULES: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
"""The module of each activation; "identity" has none."""


def sequential(layers: Sequence[Layer]) -> nn.Sequential:
    """Return a plain ``nn.Sequential`` with copies of the layers' weights and biases, without their masks.

    torch's random state is left alone.
    """
    modules: list[nn.Module] = []
    for layer in layers:
        outputs, inputs = layer.weight.shape
        linear = nn.Linear(inputs, outputs, bias=layer.bias is not None, device="meta")
        linear.weight = nn.Parameter(torch.from_numpy(np.array(layer.weight, order="C")))
        if layer.bias is not None:
            linear.bias = nn.Parameter(torch.from_numpy(np.array(layer.bias)))
        modules.append(linear)
        if layer.activation in ACTIVATION_MODULES:
            modules.append(ACTIVATION_MODULES[layer.activation]())
    return nn.Sequential(*modules)


def linears(module: nn.Sequential) -> list[nn.Linear]:
    """Return the linear modules of what ``sequential`` made, in order."""
    return [part for part in module if isinstance(part, nn.Linear)]


def mask_weight(linear: nn.Linear, mask: Bool) -> None:
    """Put a copy of a mask, (out, in), on a linear module with ``torch.nn.utils.prune.custom_from_mask``.

    From then on ``weight`` is ``weight_orig``, a parameter, times ``weight_mask``, a float32 buffer.
    """
    prune.custom_from_mask(linear, "weight", torch.tensor(mask))  # type: ignore[no-untyped-call]


def tensor(array: npt.NDArray[Any]) -> Tensor:
    """Return a tensor on the array's memory, which nothing here writes to: torch's warning does not apply."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)
