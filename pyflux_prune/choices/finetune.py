"""Axis 4: what do the survivors restart from?"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from ..errors import InvalidInput
from .checks import Choice, choices_on, count, shown


@dataclass(frozen=True)
class Restart(Choice, to=count(0)):
    """What do the survivors restart from?"""

    goes_back: ClassVar[bool] = False
    """Whether that takes values from before the first pruning."""


@dataclass(frozen=True)
class Continue(Restart):
    """The survivors keep their trained values and are trained on (Han et al. 2015).

    The learning rate stays at what it was in the last epoch of the first training.
    """


@dataclass(frozen=True)
class Rewind(Restart):
    """The survivors go back to their values after ``to`` training steps; 0 is the initialisation.

    Frankle & Carbin 2019 (``to=0``); late rewinding: Frankle et al. 2020, arXiv:1912.05671.
    """

    goes_back: ClassVar[bool] = True
    to: int = 0


@dataclass(frozen=True)
class LearningRateRewind(Restart):
    """The survivors keep their trained values; the learning rate starts again as in the first training.

    Renda, Frankle & Carbin 2020, arXiv:2003.02389. Without ``decay`` in ``Training`` the same as ``Continue``.
    """


@dataclass(frozen=True)
class Reinitialize(Restart):
    """The survivors start from new random values; biases and all else from their initial ones."""

    goes_back: ClassVar[bool] = True


FineTune = Restart | None
"""``None``: prune without training again."""


FINETUNES = "none|continue|rewind|rewind:STEP|learningraterewind|reinitialize"


def finetune_by_name(name: str) -> FineTune:
    """Return the fine-tuning of one of the names in ``FINETUNES``."""
    kind, colon, step = name.partition(":")
    if kind == "rewind" and (not colon or re.fullmatch("[0-9]{1,19}", step)):
        return Rewind(int(step or 0))
    plain = {c.__name__.lower(): c for c in choices_on(Restart) if c is not Rewind}
    if not colon and kind == "none":
        return None
    if not colon and kind in plain:
        return plain[kind]()
    raise InvalidInput(f"finetune must be {FINETUNES}, not {shown(name)}")
