"""Optimal brain damage: the diagonal of the Hessian (LeCun, Denker & Solla 1990)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from ....choices import OBD
from ....errors import InvalidInput
from ...base import Samples
from ..double import Double, samples
from .base import score

if TYPE_CHECKING:
    from ..model import TorchModel

EXACT_LIMIT = 20_000
"""Parameters that ``exact`` takes at most."""


@score.register(OBD)
def _(criterion: OBD, model: TorchModel, data: Samples | None) -> list[Tensor]:
    net, (x, y) = model.double(), samples(data)
    curvatures = _exact(net, x, y) if criterion.exact else _recursion(net, x)
    return [h * weight.square() / 2 for h, weight in zip(curvatures, net.weights, strict=True)]


def _recursion(net: Double, x: Tensor) -> list[Tensor]:
    """Return the second derivatives in the weights, approximately: h_ij = E[d_i·x_j²], d = σ'(a)²·t.

    t is p·(1 − p) at the softmax, and (W²)ᵀ·d of the layer above elsewhere.
    """
    passed, curvatures = net.forward(x), []
    p = passed[-1].softmax(1)
    t = p * (1 - p)
    for place in reversed(range(len(net.weights))):
        a = linear(passed[place], net.weights[place], net.biases[place])
        slopes = torch.func.vjp(net.activations[place], a)[1]
        d = slopes(torch.ones_like(a))[0].square() * t
        curvatures.append(d.T @ passed[place].square() / len(x))
        t = d @ net.weights[place].square()
    return curvatures[::-1]


def _exact(net: Double, x: Tensor, y: Tensor) -> list[Tensor]:
    """Return the second derivatives in the weights.

    a = W·x is linear in W: ∂²L/∂w_ij² of one sample is ∂²L/∂a_i²·x_j². The former is entry i of the Hessian in a
    times the unit vector e_i, here for all samples at once.
    """
    size = sum(p.numel() for p in (*net.weights, *net.biases) if p is not None)
    if size > EXACT_LIMIT:
        raise InvalidInput(
            f"OBD with exact=True takes at most {EXACT_LIMIT:,} parameters, and the network has {size:,}: "
            "use exact=False"
        )
    passed, curvatures = net.forward(x), []
    for place, weight in enumerate(net.weights):

        def loss(a: Tensor, place: int = place) -> Tensor:
            outputs = net.above(place).forward(net.activations[place](a))[-1]
            return cross_entropy(outputs, y, reduction="sum")

        a = linear(passed[place], weight, net.biases[place])
        hessian_times = torch.func.vjp(torch.func.grad(loss), a)[1]
        second = [hessian_times(e.expand_as(a))[0] @ e for e in torch.eye(len(weight), dtype=torch.float64)]
        curvatures.append(torch.stack(second) @ passed[place].square() / len(x))
    return curvatures
