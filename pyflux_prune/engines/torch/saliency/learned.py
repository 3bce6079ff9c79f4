"""Criteria that training learns, on a float64 copy of the network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ....choices import EdgePopup, Layerwise, Movement
from ...base import Samples
from ..double import samples
from ..structure import Contest
from ..training import Stepper, batches
from .base import score

if TYPE_CHECKING:
    from ..model import TorchModel


@score.register(Movement)
def _(criterion: Movement, model: TorchModel, data: Samples | None) -> list[Tensor]:
    net, (x, y) = model.double(), samples(data)
    for module in net.before:
        module.train()
    parameters = [*net.weights, *(bias for bias in net.biases if bias is not None), *net.norms]
    for parameter in parameters:
        parameter.requires_grad_()
    stepper = Stepper(criterion.training.optimiser, parameters)
    scores = [torch.zeros_like(weight) for weight in net.weights]
    for batch in batches(x, y, criterion.training, stepper):
        gradients = torch.autograd.grad(net.loss(*batch, net.weights), parameters)
        for total, weight, g in zip(scores, net.weights, gradients, strict=False):
            total -= weight.detach() * g
        stepper.step(gradients)
    return scores


@score.register(EdgePopup)
def _(criterion: EdgePopup, model: TorchModel, data: Samples | None) -> list[Tensor]:
    net, (x, y) = model.double(), samples(data)
    contest = Contest(Layerwise(), net.names, net.masks)
    kept = contest.kept(criterion.sparsity, net.masks)
    scores = [weight.abs() for weight in net.weights]
    stepper = Stepper(criterion.training.optimiser, scores)
    for batch in batches(x, y, criterion.training, stepper):
        chosen = contest.choose(scores, net.masks, kept)
        used = [(weight * mask).requires_grad_() for weight, mask in zip(net.weights, chosen, strict=True)]
        gradients = torch.autograd.grad(net.loss(*batch, used), used)
        stepper.step([weight * g for weight, g in zip(net.weights, gradients, strict=True)])
    return scores
