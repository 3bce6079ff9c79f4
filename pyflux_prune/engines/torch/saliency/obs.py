"""Optimal brain surgeon: w²/(2·[H⁻¹]_qq), and w_K += H_KK⁻¹·H_KP·w_P (Hassibi & Stork 1993)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ....choices import OBS
from ....errors import InvalidInput
from ...base import Samples
from ...parts import Layer
from ..double import Double, patches, samples
from .base import compensate, score

if TYPE_CHECKING:
    from ..model import TorchModel

FULL_LIMIT = 5_000
"""Kept weights and biases that ``full`` takes at most."""

_CHUNK = 2**23
"""Entries of Jacobians that are held at a time."""


@score.register(OBS)
def _(criterion: OBS, model: TorchModel, data: Samples | None) -> list[Tensor]:
    net, (x, _) = model.double(), samples(data)
    if criterion.full:
        net = net.perceptron()
    spread = _full_inverse(criterion, net, x) if criterion.full else _layer_inverses(criterion, net, x)
    return [weight.square() / (2 * values) for weight, values in zip(net.weights, spread, strict=True)]


@compensate.register(OBS)
def _(criterion: OBS, model: TorchModel, data: Samples | None, after: Sequence[Tensor]) -> None:
    net, (x, _) = model.double(), samples(data)
    if criterion.full:
        _move_all(criterion, net.perceptron(), x, after)
    else:
        _move_rows(criterion, net, x, after)
    model.write(net)


def _damped(matrix: Tensor, damping: float) -> Tensor:
    """Return the matrix, ``damping`` times the mean of its diagonal added to the diagonal."""
    return matrix + torch.diag(matrix.diagonal().mean().expand(len(matrix)) * damping)


def _factor(matrix: Tensor, of: str) -> Tensor:
    """Return the Cholesky factor; InvalidInput where the matrix is singular, but for rounding."""
    if not len(matrix):
        return matrix
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    least = torch.finfo(matrix.dtype).eps * len(matrix) * matrix.diagonal().max()
    if not matrix.isfinite().all():
        raise InvalidInput(f"OBS: the Hessian of {of} holds NaN or infinity")
    if info or factor.diagonal().square().min() <= least:
        raise InvalidInput(f"OBS: the Hessian of {of} is singular; use a larger damping, or more data")
    return factor


def _inverse_diagonal(factor: Tensor) -> Tensor:
    """Return the diagonal of (L·Lᵀ)⁻¹: the squared norms of the columns of L⁻¹."""
    eye = torch.eye(len(factor), dtype=factor.dtype)
    inverse: Tensor = torch.linalg.solve_triangular(factor, eye, upper=False)
    return inverse.square().sum(0)


# --- by layer --------------------------------------------------------------------------------------------


def _hessians(criterion: OBS, net: Double, x: Tensor) -> list[Tensor]:
    """Return each layer's E[x·xᵀ], (in, in), damped; x are patches of the inputs of a convolution."""

    def total(layer: Layer, inputs: Tensor, outputs: Tensor) -> Tensor:
        found = patches(layer, inputs)
        rows = found.movedim(1, 2).flatten(0, 1)
        return rows.T @ rows / found.shape[2]

    return [_damped(mean, criterion.damping) for mean in net.means(x, total)]


def _same_inputs(mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows of a mask that are equal, as a column of indices, and the columns that they keep, if any."""
    kinds, kind_of = torch.unique(mask, dim=0, return_inverse=True)
    for number, kept in enumerate(kinds):
        if kept.any():
            yield (kind_of == number).nonzero(), kept.nonzero().squeeze(1)


def _layer_inverses(criterion: OBS, net: Double, x: Tensor) -> list[Tensor]:
    """Return, for each weight, its place on the diagonal of the inverse of its row's Hessian."""
    diagonals = [torch.ones_like(weight) for weight in net.weights]
    for name, mask, hessian, diagonal in zip(
        net.names, net.masks, _hessians(criterion, net, x), diagonals, strict=True
    ):
        for rows, kept in _same_inputs(mask.flatten(1)):
            factor = _factor(hessian[kept][:, kept], f"layer {name}")
            diagonal.view(len(mask), -1)[rows, kept] = _inverse_diagonal(factor)
    return diagonals


def _move_rows(criterion: OBS, net: Double, x: Tensor, after: Sequence[Tensor]) -> None:
    rows_of = ([array.view(len(array), -1) for array in arrays] for arrays in (net.weights, net.masks, after))
    for name, weight, before, mask, hessian in zip(net.names, *rows_of, _hessians(criterion, net, x), strict=True):
        gone = before & ~mask
        pull = (weight * gone) @ hessian
        losing = gone.any(1).nonzero().squeeze(1)
        for places, kept in _same_inputs(mask[losing]):
            rows = losing[places]
            factor = _factor(hessian[kept][:, kept], f"layer {name}")
            weight[rows, kept] += torch.cholesky_solve(pull[rows, kept].T, factor).T


# --- full ------------------------------------------------------------------------------------------------


def _parameters(net: Double) -> Tensor:
    """Return the kept weights, layer by layer, and then all biases."""
    weights = [weight[mask] for weight, mask in zip(net.weights, net.masks, strict=True)]
    return torch.cat([*weights, *(bias for bias in net.biases if bias is not None)])


def _spread(net: Double, values: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return what ``_parameters`` put in one row as weights, 1 where pruned, and biases."""
    parts, weights = iter(torch.split(values, _sizes(net))), []
    for mask in net.masks:
        weights.append(torch.ones_like(mask, dtype=values.dtype).masked_scatter(mask, next(parts)))
    return weights, [None if bias is None else next(parts) for bias in net.biases]


def _sizes(net: Double) -> list[int]:
    return [*(int(mask.sum()) for mask in net.masks), *(len(bias) for bias in net.biases if bias is not None)]


def _gauss_newton(criterion: OBS, net: Double, x: Tensor) -> Tensor:
    """Return E[Jᵀ·(diag(p) − p·pᵀ)·J] in what ``_parameters`` returns, damped."""
    size = sum(_sizes(net))
    if size > FULL_LIMIT:
        raise InvalidInput(
            f"OBS with full=True takes at most {FULL_LIMIT:,} kept weights and biases, and the network has "
            f"{size:,}: use full=False"
        )
    total = torch.zeros(size, size, dtype=torch.float64)
    for part in torch.split(x, 1 + _CHUNK // (1 + net.classes * size)):
        p = net.forward(part).softmax(1)
        output_hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        j = _jacobian(net, part)
        total += j.flatten(0, 1).T @ (output_hessian @ j).flatten(0, 1)
    return _damped(total / len(x), criterion.damping)


def _jacobian(net: Double, x: Tensor) -> Tensor:
    """Return the derivatives of the outputs in what ``_parameters`` returns, (samples, outputs, parameters).

    Of a = W·x + b, those in w_ij are those in b_i times x_j, also where there is no b: it is 0 then.
    """
    biases = [
        weight.new_zeros(len(weight)) if bias is None else bias
        for weight, bias in zip(net.weights, net.biases, strict=True)
    ]

    def outputs(biases: list[Tensor], sample: Tensor) -> Tensor:
        return net.forward(sample, biases=biases)

    in_biases = torch.func.vmap(torch.func.jacrev(outputs), in_dims=(None, 0))(biases, x)
    parts = []
    for mask, passed, derivatives in zip(net.masks, net.passed(x).inputs, in_biases, strict=True):
        rows, columns = mask.nonzero(as_tuple=True)
        parts.append(derivatives[:, :, rows] * passed[:, None, columns])
    parts += [d for d, bias in zip(in_biases, net.biases, strict=True) if bias is not None]
    return torch.cat(parts, 2)


def _full_inverse(criterion: OBS, net: Double, x: Tensor) -> list[Tensor]:
    """Return, for each weight, its place on the diagonal of the inverse of the Gauss–Newton matrix."""
    return _spread(net, _inverse_diagonal(_factor(_gauss_newton(criterion, net, x), "the network")))[0]


def _move_all(criterion: OBS, net: Double, x: Tensor, after: Sequence[Tensor]) -> None:
    matrix, values = _gauss_newton(criterion, net, x), _parameters(net)
    stays = torch.ones(len(values), dtype=torch.bool)
    weights_stay = torch.cat([left[mask] for left, mask in zip(after, net.masks, strict=True)])
    stays[: len(weights_stay)] = weights_stay
    if stays.any():
        pull = matrix[stays][:, ~stays] @ values[~stays]
        factor = _factor(matrix[stays][:, stays], "the network")
        values[stays] += torch.cholesky_solve(pull[:, None], factor).squeeze(1)
        net.weights[:], net.biases[:] = _spread(net, values)
