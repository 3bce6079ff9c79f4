"""Optimisers and batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...choices import Adam, AdamW, Descent, Momentum, Nesterov, Optimiser, RMSProp, Training
from ...errors import InvalidInput


class Stepper:
    """One of torch's optimisers, with the update of an Optimisers.jl rule.

    The two differ in what a new learning rate η does to momentum: torch remembers gradients, which the new η
    scales too, and Optimisers.jl steps, which keep the η of their time. Here it is as in Optimisers.jl, in that
    torch keeps the first η and the gradients are scaled.
    """

    def __init__(self, rule: Optimiser, parameters: Sequence[Tensor]) -> None:
        """Begin with empty memory."""
        self._parameters = list(parameters)
        self._optimiser = _optimiser(rule, self._parameters)
        self._first = self._eta = rule.eta

    def adjust(self, eta: float) -> None:
        """Set the learning rate; the memory stays."""
        self._eta = eta
        if not isinstance(self._optimiser, torch.optim.SGD):
            for group in self._optimiser.param_groups:
                group["lr"] = eta

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Update the parameters, given the gradient in each of them."""
        sgd = isinstance(self._optimiser, torch.optim.SGD)
        scale = self._eta / self._first if sgd else 1.0
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient if scale == 1.0 else gradient * scale
        self._optimiser.step()

    def forget(self, parameter: Tensor, where: Tensor) -> None:
        """Empty the memory of some entries of a parameter, which would move them again."""
        for memory in self._optimiser.state[parameter].values():
            if isinstance(memory, Tensor) and memory.shape == where.shape:  # not Adam's step count
                memory.masked_fill_(where, 0)


def _optimiser(rule: Optimiser, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    match rule:
        case Descent(eta):
            return torch.optim.SGD(parameters, lr=eta)
        case Momentum(eta, rho):
            return torch.optim.SGD(parameters, lr=eta, momentum=rho)
        case Nesterov(eta, rho):  # without momentum it is plain descent, but torch refuses the flag
            return torch.optim.SGD(parameters, lr=eta, momentum=rho, nesterov=rho > 0)
        case RMSProp(eta, rho, epsilon):
            return torch.optim.RMSprop(parameters, lr=eta, alpha=rho, eps=epsilon)
        case Adam(eta, beta, epsilon):
            return torch.optim.Adam(parameters, lr=eta, betas=beta, eps=epsilon)
        case AdamW(eta, beta, lambda_, epsilon):
            return torch.optim.AdamW(parameters, lr=eta, betas=beta, eps=epsilon, weight_decay=lambda_)
    raise InvalidInput(f"optimiser must be one that the torch engine has, not {rule!r}")


def batches(x: Tensor, y: Tensor, training: Training, stepper: Stepper) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of every epoch, of consecutive samples; the last of an epoch may be smaller.

    The learning rate of ``stepper`` falls from epoch to epoch as ``training`` says.
    """
    for epoch in range(training.epochs):
        stepper.adjust(training.eta(epoch))
        yield from zip(torch.split(x, training.batchsize), torch.split(y, training.batchsize), strict=True)
