"""Axis 2: what competes with what, and what goes together?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import InvalidInput
from .checks import Choice, choices_on, count, flag, listed, number, plain, shown
from .saliency import Saliency


def _places(name: str, value: object) -> tuple[int, ...]:
    places = listed(value)
    places = (plain(value),) if places is None else places
    if all(isinstance(i, (int, np.integer)) and not isinstance(i, bool) for i in places):
        return tuple(int(i) for i in places)
    raise InvalidInput(
        f"{name} must be layer numbers, such as (0, -1) for the first and the last, not {shown(value)}"
    )


@dataclass(frozen=True, kw_only=True)
class Structure(
    Choice,
    exclude=_places,
    min_kept=count(0),
    n=count(1),
    m=count(2),
    layerwise=flag,
    norm=number(1, math.inf),
):
    """What competes with what, and what goes together?

    Attributes:
        exclude: prunable layers that are left alone, counted from 0, or from the end: (0, -1) are the first and
            the last. Their weights do not count among those that compete.
        min_kept: how many weights (with ``Neurons``, neurons) of each layer stay at least, those that score
            highest.

    """

    _per_layer: ClassVar[bool] = False

    exclude: tuple[int, ...] = ()
    min_kept: int = 0

    @property
    def per_layer(self) -> bool:
        """Whether a sparsity may be one per competing layer."""
        return self._per_layer


@dataclass(frozen=True)
class Global(Structure):
    """All prunable weights of the network compete with each other."""


@dataclass(frozen=True)
class Layerwise(Structure):
    """Weights compete within their layer; a sparsity may then be one number, or one per layer."""

    _per_layer: ClassVar[bool] = True


@dataclass(frozen=True)
class PerOutput(Structure):
    """Weights compete with those of the same output neuron (Sun et al. 2023, arXiv:2306.11695).

    A sparsity may be one number, or one per layer.
    """

    _per_layer: ClassVar[bool] = True


@dataclass(frozen=True)
class ERK(Structure):
    """Weights compete within their layer, the layers' densities by Erdős–Rényi (Mocanu et al. 2018).

    The density of a layer of i inputs and o outputs is proportional to (i + o)/(i·o), at most 1, such that the
    sparsity asked for is reached over all layers (Evci et al. 2020, arXiv:1911.11134, where the kernel of
    convolutions counts too, hence the K).
    """


@dataclass(frozen=True)
class NofM(Structure):
    """N:M sparsity: of each ``m`` consecutive inputs of an output, at least ``n`` weights stay.

    The weights of such a group compete; without a sparsity, exactly n stay. NofM(2, 4) is the layout of
    PyTorch's semi-structured kernels. A layer's number of inputs must be a multiple of m.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        if self.n >= self.m:
            raise InvalidInput(f"NofM's n must be below m = {self.m}, not {self.n}")


@dataclass(frozen=True)
class Neurons(Structure):
    """Whole neurons: incoming and outgoing weights; never the outputs of the last layer.

    They compete over the whole network, or with ``layerwise`` within their layer; a sparsity is a share of
    neurons, and with ``layerwise`` may be one per hidden layer. A neuron's score is the ``norm`` of the scores of
    its incoming weights: with ``Magnitude`` the L1 or, ``norm=2``, L2 norm of its weights (Li et al. 2017,
    arXiv:1608.08710).
    """

    layerwise: bool = False
    norm: float = 1.0

    @property
    def per_layer(self) -> bool:
        """Whether a sparsity may be one per competing layer."""
        return self.layerwise


def check_match(saliency: Saliency, structure: Structure) -> None:
    """Raise InvalidInput where one scores neurons and the other has single weights compete."""
    if saliency.of_neurons and not isinstance(structure, Neurons):
        raise InvalidInput(
            f"structure must be Neurons with {type(saliency).__name__}, which scores neurons, not {structure!r}"
        )


STRUCTURES = {c.__name__.lower(): c for c in choices_on(Structure)}
