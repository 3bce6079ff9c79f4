"""Redundancy: neurons that others can replace (Srinivas & Babu 2015)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ....choices import Redundancy
from ...base import Samples
from ..double import Double, samples
from ..structure import alive
from .base import compensate, score

if TYPE_CHECKING:
    from ..model import TorchModel


@dataclass(frozen=True)
class _Replacements:
    """For each pair of neurons (j, i) of a layer, j being replaced by α times i plus β: (out, out) each."""

    cost: Tensor
    alpha: Tensor
    beta: Tensor


@score.register(Redundancy)
def _(criterion: Redundancy, model: TorchModel, data: Samples | None) -> list[Tensor]:
    net, scores = model.double().perceptron(), []
    for replacements, neurons in zip(_replacements(criterion, net, data), alive(net.masks), strict=False):
        scores.append(_cheapest_first(replacements.cost, neurons))
    return [*scores, torch.full((net.classes,), torch.inf, dtype=torch.float64)]


def _cheapest_first(cost: Tensor, neurons: Tensor) -> Tensor:
    """Score neurons by the cost of replacing them, one after the other, by one that is left; 0 for the others.

    The fewer are left, the higher is the least cost: scores rank neurons in the order in which they go.
    """
    scores, left = torch.zeros_like(cost[0]), neurons.nonzero().squeeze(1)
    while len(left) > 1:
        pairs = cost[left][:, left].fill_diagonal_(torch.inf)
        pair = int(pairs.argmin())  # the first of equals
        place = pair // len(left)
        scores[left[place]] = pairs.flatten()[pair]
        left = torch.cat([left[:place], left[place + 1 :]])
    scores[left] = torch.inf
    return scores


@compensate.register(Redundancy)
def _(criterion: Redundancy, model: TorchModel, data: Samples | None, after: Sequence[Tensor]) -> None:
    """Add what the next layer did with a neuron that goes to what it does with the one that replaces it."""
    net = model.double().perceptron()
    replacements = _replacements(criterion, net, data)
    for place, (replace, was, still) in enumerate(zip(replacements, alive(net.masks), alive(after), strict=True)):
        stay = still.nonzero().squeeze(1)  # neurons whose last outgoing weight goes do not
        following, bias = net.weights[place + 1], net.biases[place + 1]
        old = following.clone()
        for j in (was & ~still).nonzero().squeeze(1) if len(stay) else ():
            i = stay[replace.cost[j, stay].argmin()]
            following[:, i] += replace.alpha[j, i] * old[:, j]
            if bias is not None:
                bias += replace.beta[j, i] * old[:, j]
    model.write(net)


def _replacements(criterion: Redundancy, net: Double, data: Samples | None) -> list[_Replacements]:
    """Return those of each hidden layer."""
    found = []
    outputs = net.passed(samples(data)[0]).outputs if criterion.activations else []
    for place, following in enumerate(net.weights[1:]):
        if criterion.activations:
            each = _by_activations(outputs[place], net.biases[place + 1] is not None)
        else:
            each = _by_weights(net, place)
        found.append(_Replacements(each.cost * following.square().sum(0)[:, None], each.alpha, each.beta))
    return found


def _by_weights(net: Double, place: int) -> _Replacements:
    """Compare incoming weights and biases; the cost is yet without the outgoing weights."""
    weight, bias = net.weights[place], net.biases[place]
    incoming = weight if bias is None else torch.cat([weight, bias[:, None]], 1)
    if isinstance(net.activations[place], (nn.ReLU, nn.Identity)):
        alpha = _slopes(incoming).clamp(min=0)
    else:
        alpha = torch.ones(len(weight), len(weight), dtype=weight.dtype)
    return _Replacements(_residuals(incoming, alpha), alpha, torch.zeros_like(alpha))


def _by_activations(x: Tensor, intercept: bool) -> _Replacements:
    """Regress activations, (samples, neurons), on each other; the cost is yet without the outgoing weights."""
    mean = x.mean(0) if intercept else torch.zeros_like(x[0])
    constant = intercept & (x.amax(0) == x.amin(0))
    points = torch.where(constant, 0.0, x - mean).T
    alpha = _slopes(points)
    return _Replacements(_residuals(points, alpha) / len(x), alpha, mean[:, None] - alpha * mean)


def _slopes(points: Tensor) -> Tensor:
    """Return the α that brings α times row i nearest to row j, for each (j, i); 0 where row i is 0."""
    columns = []
    for i, point in enumerate(points):
        products = (points * point).sum(1)  # row by row alike, so that α = 1 for equal rows
        columns.append(torch.where(products[i] == 0, 0.0, products / products[i]))
    return torch.stack(columns, 1)


def _residuals(points: Tensor, alpha: Tensor) -> Tensor:
    """Return the squared distance from row j to α times row i, for each (j, i); 0 where only rounding is left."""
    columns = [
        (points - factors[:, None] * point).square().sum(1) for factors, point in zip(alpha.T, points, strict=True)
    ]
    distances = torch.stack(columns, 1)
    return torch.where(distances > 1e-12 * points.square().sum(1)[:, None], distances, 0.0)
