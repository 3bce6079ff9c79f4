"""Networks that multiply with what is kept only."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..base import Kernels
from ..parts import Float, Layer
from .modules import ACTIVATION_MODULES, tensor


def sparsify(layers: Sequence[Layer], kernels: Kernels) -> Callable[[Float], Float]:
    """Return the function of a list of dense layers, sparse ones as CSR matrices."""
    chosen = [kernels] * len(layers) if isinstance(kernels, str) else kernels
    weights = [torch.from_numpy(la.weight.copy()) for la in layers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        weights = [w if k == "dense" else w.to_sparse_csr() for w, k in zip(weights, chosen, strict=True)]
    biases = [
        torch.zeros(len(w), 1) if la.bias is None else torch.tensor(la.bias)[:, None]
        for w, la in zip(weights, layers, strict=True)
    ]
    activations = [ACTIVATION_MODULES.get(la.activation, nn.Identity)() for la in layers]

    def fast(x: Float) -> Float:
        passed = tensor(x).T
        for weight, bias, activation in zip(weights, biases, activations, strict=True):
            passed = activation(weight @ passed + bias)
        outputs: Float = passed.T.contiguous().numpy()
        return outputs

    return fast
