"""Prune and regrow: what grows in the place of the smallest weights while a sparse network trains?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .checks import Choice, choices_on, count, number


@dataclass(frozen=True)
class Regrowth(Choice, fraction=number(0, 1, open_low=True), seed=count(0)):
    """Now and then, the weights of least magnitude of each layer give way to as many others, which begin at 0.

    Attributes:
        fraction: of the kept weights that give way at first; it falls to 0 along a half cosine.

    """

    random: ClassVar[bool] = False
    """Whether the two engines draw different numbers."""

    fraction: float = 0.3


@dataclass(frozen=True)
class SET(Regrowth):
    """Sparse evolutionary training: random weights grow (Mocanu et al. 2018, arXiv:1707.04780)."""

    random: ClassVar[bool] = True
    seed: int = 0


@dataclass(frozen=True)
class RigL(Regrowth):
    """The rigged lottery: weights with the largest gradients grow (Evci et al. 2020, arXiv:1911.11134)."""


REGROWTHS = {c.__name__.lower(): c for c in choices_on(Regrowth)}
