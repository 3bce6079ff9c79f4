"""Optimal brain damage: the diagonal of the Hessian (LeCun, Denker & Solla 1990)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from ....choices import OBD
from ....errors import InvalidInput
from ...base import Samples
from ..double import Double, patches, product, samples
from .base import score

if TYPE_CHECKING:
    from ..model import TorchModel

EXACT_LIMIT = 20_000
"""Parameters that ``exact`` takes at most."""


@score.register(OBD)
def _(criterion: OBD, model: TorchModel, data: Samples | None) -> list[Tensor]:
    net, (x, y) = model.double(), samples(data)
    curvatures = _exact(net, x, y) if criterion.exact else _recursion(net.perceptron(), x)
    return [h * weight.square() / 2 for h, weight in zip(curvatures, net.weights, strict=True)]


def _recursion(net: Double, x: Tensor) -> list[Tensor]:
    """Return the second derivatives in the weights, approximately: h_ij = E[d_i·x_j²], d = σ'(a)²·t.

    t is p·(1 − p) at the softmax, and (W²)ᵀ·d of the layer above elsewhere.
    """
    inputs, outputs = net.passed(x)
    p, curvatures = outputs[-1].softmax(1), []
    t = p * (1 - p)
    for place in reversed(range(len(net.weights))):
        a = linear(inputs[place], net.weights[place], net.biases[place])
        slopes = torch.func.vjp(net.activations[place], a)[1]
        d = slopes(torch.ones_like(a))[0].square() * t
        curvatures.append(d.T @ inputs[place].square() / len(x))
        t = d @ net.weights[place].square()
    return curvatures[::-1]


def _exact(net: Double, x: Tensor, y: Tensor) -> list[Tensor]:
    """Return the second derivatives of the mean loss in the weights."""
    size = sum(p.numel() for p in (*net.weights, *net.biases, *net.norms) if p is not None)
    if size > EXACT_LIMIT:
        raise InvalidInput(
            f"OBD with exact=True takes at most {EXACT_LIMIT:,} parameters, and the network has {size:,}: "
            "use exact=False"
        )
    totals = [torch.zeros_like(weight) for weight in net.weights]
    for portion, labels in zip(net.split(x), net.split(y), strict=True):
        for place, inputs in enumerate(net.passed(portion).inputs):
            totals[place] += _diagonal(net, place, inputs, labels).view_as(totals[place])
    return [total / len(x) for total in totals]


def _diagonal(net: Double, place: int, x: Tensor, y: Tensor) -> Tensor:
    """Return the second derivatives of the summed loss in the weights of one layer, given the layer's inputs.

    a = W·x is linear in W: with P the patches of x that w_ij is multiplied with, and H the Hessian in a_i at their
    places, ∂²L/∂w_ij² = Pᵀ·H·P. In a dense layer there is one place, and H the same for all j.
    """
    layer, weight = net.layers[place], net.weights[place]

    def loss(a: Tensor) -> Tensor:
        outputs = net.above(place).forward(net.activations[place](a))
        return cross_entropy(outputs, y, reduction="sum")

    a = product(layer, x, weight, net.biases[place])
    hessian_times = torch.func.vjp(torch.func.grad(loss), a)[1]

    def curvature(output: int, direction: Tensor) -> Tensor:
        """Return H·d of each sample for one output, d the same for each place of all samples, or for each."""
        tangent = torch.zeros_like(a)
        tangent[:, output] = direction
        found: Tensor = hessian_times(tangent)[0][:, output]
        return found

    if a.ndim == 2:
        one = torch.ones_like(a[:, 0])
        return torch.stack([curvature(output, one) @ x.square() for output in range(len(weight))])
    columns = patches(layer, x).movedim(1, 0).reshape(-1, len(x), *a.shape[2:])
    return torch.stack(
        [
            torch.stack([(curvature(output, column) * column).sum() for column in columns])
            for output in range(len(weight))
        ]
    )
