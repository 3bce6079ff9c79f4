"""Networks that multiply with what is kept only."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..base import Kernels
from ..parts import Float, Layer, Part, input_shape
from .modules import by_part, tensor


def sparsify(parts: Sequence[Part], kernels: Kernels) -> Callable[[Float], Float]:
    """Return a network as a function with CSR matrices for its dense layers; torch has no sparse convolutions."""
    layers = [part for part in parts if isinstance(part, Layer)]
    chosen = iter([kernels] * len(layers) if isinstance(kernels, str) else kernels)
    steps, shape = list[Callable[[Tensor], Tensor]](), input_shape(parts)
    for part, modules in by_part(parts):
        kernel = next(chosen) if isinstance(part, Layer) else "dense"
        if type(part) is Layer and kernel != "dense":
            steps.append(csr(part))
            modules = modules[1:]
        steps += [module.eval() for module in modules]

    @torch.no_grad()
    def fast(x: Float) -> Float:
        passed = tensor(x).view(len(x), *shape)
        for step in steps:
            passed = step(passed)
        outputs: Float = passed.flatten(1).contiguous().numpy()
        return outputs

    return fast


def csr(layer: Layer) -> Callable[[Tensor], Tensor]:
    """Return what a dense layer does before its activation, as a product with a sparse matrix."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        weight = torch.from_numpy(layer.weight.copy()).to_sparse_csr()
    bias = torch.zeros(len(weight), 1) if layer.bias is None else torch.tensor(layer.bias)[:, None]
    return lambda x: (weight @ x.T + bias).T
