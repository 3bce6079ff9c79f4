"""Optimisers, named like their rules in Optimisers.jl, and the training options."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..errors import InvalidInput
from .checks import Choice, check_choice, check_sparsity, count, number, positive, shown


def _pair(name: str, value: object) -> tuple[float, float]:
    pair = check_sparsity(value, name)
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise InvalidInput(f"{name} must be two numbers in [0, 1), not {shown(value)}")
    return pair


@dataclass(frozen=True)
class Optimiser(
    Choice,
    eta=positive,
    rho=number(0, 1),
    beta=_pair,
    lambda_=number(0, math.inf),
    epsilon=positive,
):
    """An optimiser with the name and fields of its rule in Optimisers.jl; ``eta`` is the learning rate."""

    eta: float


@dataclass(frozen=True)
class Descent(Optimiser):
    """Gradient descent: w ← w − η·g."""

    eta: float = 0.1


@dataclass(frozen=True)
class Momentum(Optimiser):
    """Gradient descent with momentum ρ."""

    eta: float = 0.01
    rho: float = 0.9


@dataclass(frozen=True)
class Nesterov(Optimiser):
    """Gradient descent with Nesterov momentum ρ."""

    eta: float = 0.001
    rho: float = 0.9


@dataclass(frozen=True)
class RMSProp(Optimiser):
    """RMSProp with decay ρ (not centred)."""

    eta: float = 0.001
    rho: float = 0.9
    epsilon: float = 1e-8


@dataclass(frozen=True)
class Adam(Optimiser):
    """Adam (Kingma & Ba 2015, arXiv:1412.6980)."""

    eta: float = 0.001
    beta: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8


@dataclass(frozen=True)
class AdamW(Optimiser):
    """Adam with decoupled weight decay λ, w ← w − η·λ·w (Loshchilov & Hutter 2019, arXiv:1711.05101).

    λ is 0.01 by default, as in PyTorch; Optimisers.jl's default is 0.
    """

    eta: float = 0.001
    beta: tuple[float, float] = (0.9, 0.999)
    lambda_: float = 0.01
    epsilon: float = 1e-8


def _optimiser(name: str, value: Any) -> Any:
    check_choice(name, value, Optimiser)
    return value


@dataclass(frozen=True)
class Training(
    Choice, epochs=count(0), batchsize=count(1), optimiser=_optimiser, decay=number(0, 1.5, open_low=True)
):
    """How each round is trained: softmax cross-entropy, shuffled batches, optimiser memory empty at the start.

    Attributes:
        epochs: passes over the training set in each round.
        batchsize: samples per step; the last batch of an epoch may be smaller.
        optimiser: one of ``Descent``, ``Momentum``, ``Nesterov``, ``RMSProp``, ``Adam``, ``AdamW``.
        decay: the learning rate is multiplied by this after every epoch of a round.

    """

    epochs: int = 15
    batchsize: int = 60
    optimiser: Optimiser = field(default_factory=lambda: Adam(1.2e-3))
    decay: float = 1.0

    def eta(self, epoch: int) -> float:
        """Return the learning rate of an epoch, counted from 0."""
        return self.optimiser.eta * self.decay**epoch


def check_training(name: str, value: Any) -> Any:
    """Return a ``Training``; InvalidInput for anything else."""
    check_choice(name, value, Training)
    return value
