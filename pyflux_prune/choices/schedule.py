"""Axis 3: how much goes at each round?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidInput
from .checks import Choice, Sparsity, check_sparsity, choices_on, listed, positive, share, shown, steps


def _each(rule: Callable[..., float], *values: Sparsity) -> Sparsity:
    """Apply a scalar rule to scalars, or layer by layer where any value is one per layer."""
    lengths = {len(v) for v in values if isinstance(v, tuple)}
    if not lengths:
        return rule(*values)
    if len(lengths) > 1:
        raise InvalidInput(f"per-layer values must all have the same length, not {sorted(lengths)}")
    n = lengths.pop()
    columns = [v if isinstance(v, tuple) else (v,) * n for v in values]
    return tuple(rule(*row) for row in zip(*columns, strict=True))


@dataclass(frozen=True)
class Schedule(Choice, sparsity=share, rate=share, rounds=steps, power=positive):
    """How much goes at each round?"""

    def sparsities(self) -> list[Sparsity]:
        """Return the target sparsity of each round."""
        raise NotImplementedError


@dataclass(frozen=True)
class OneShot(Schedule):
    """All at once: a single round at ``sparsity``."""

    sparsity: Sparsity

    def sparsities(self) -> list[Sparsity]:
        """Return the target sparsity of each round."""
        return [self.sparsity]


@dataclass(frozen=True)
class Constant(Schedule):
    """Each of ``rounds`` rounds prunes the share ``rate`` of the initial weights: s_k = k·rate."""

    rate: Sparsity
    rounds: int

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        rates = self.rate if isinstance(self.rate, tuple) else (self.rate,)
        if any(r * self.rounds >= 1 for r in rates):
            raise InvalidInput(f"Constant: rate × rounds must be below 1, not {shown(self.rate)} × {self.rounds}")

    def sparsities(self) -> list[Sparsity]:
        """Return the target sparsity of each round."""
        return _rounds(self.rounds, lambda k, rate: k * rate, self.rate)


@dataclass(frozen=True)
class Exponential(Schedule):
    """Each of ``rounds`` rounds prunes the share ``rate`` of what is left: s_k = 1 − (1 − rate)^k.

    The schedule of iterative magnitude pruning (Frankle & Carbin 2019, arXiv:1803.03635).
    """

    rate: Sparsity
    rounds: int

    def sparsities(self) -> list[Sparsity]:
        """Return the target sparsity of each round."""
        return _rounds(self.rounds, lambda k, rate: 1 - (1 - rate) ** k, self.rate)


@dataclass(frozen=True)
class Polynomial(Schedule):
    """From 0 to ``sparsity``, fast first: s_k = sparsity·(1 − (1 − k/rounds)^power).

    With ``power=3`` the cubic schedule of Zhu & Gupta 2017 (arXiv:1710.01878).
    """

    sparsity: Sparsity
    rounds: int
    power: float = 3.0

    def sparsities(self) -> list[Sparsity]:
        """Return the target sparsity of each round."""
        n, p = self.rounds, self.power
        return _rounds(n, lambda k, s: s * (1 - (1 - k / n) ** p), self.sparsity)


@dataclass(frozen=True)
class Cosine(Schedule):
    """From 0 to ``sparsity``, slow at both ends: s_k = sparsity·(1 − cos(π·k/rounds))/2."""

    sparsity: Sparsity
    rounds: int

    def sparsities(self) -> list[Sparsity]:
        """Return the target sparsity of each round."""
        n = self.rounds
        return _rounds(n, lambda k, s: s * (1 - math.cos(math.pi * k / n)) / 2, self.sparsity)


def _rounds(n: int, rule: Callable[[int, float], float], value: Sparsity) -> list[Sparsity]:
    """Return ``rule(k, value)`` for the rounds 1 to n, layer by layer where the value is one per layer."""
    return [
        tuple(rule(k, v) for v in value) if isinstance(value, tuple) else rule(k, value) for k in range(1, n + 1)
    ]


Sparsities = Schedule | Sequence[float | Sequence[float]]
"""A schedule, or any list of sparsities; from a function f it is ``[f(k) for k in range(1, n + 1)]``."""


def sparsities(schedule: Sparsities) -> list[Sparsity]:
    """Return the target sparsity of each round of a schedule, or of any list of sparsities.

    Raises:
        InvalidInput: a sparsity outside [0, 1), an empty list, or a schedule that goes down.

    """
    if isinstance(schedule, Schedule):
        given: Sequence[Any] | None = schedule.sparsities()
    else:
        given = listed(schedule)
    if given is None:
        names = ", ".join(c.__name__ for c in choices_on(Schedule))
        raise InvalidInput(f"schedule must be {names} or a list of sparsities, not {shown(schedule)}")
    targets = [check_sparsity(s, "each sparsity of a schedule") for s in given]
    if not targets:
        raise InvalidInput("schedule must hold at least one sparsity, not an empty list")
    for before, after in itertools.pairwise(targets):
        down = _each(lambda a, b: float(b < a), before, after)
        if any(down if isinstance(down, tuple) else (down,)):
            raise InvalidInput(
                f"schedule must never go down, but {shown(after)} follows {shown(before)}: pruned stays pruned"
            )
    return targets


def schedule_by_name(name: str, sparsity: Sparsity | None, rounds: int | None) -> Sparsities:
    """Return the schedule of this name that ends at ``sparsity`` after ``rounds``.

    By default there are 12 rounds, and each prunes 20 % of what is left (or the sparsity that this ends at).
    """
    if name not in SCHEDULES:
        raise InvalidInput(f"schedule must be one of {', '.join(SCHEDULES)}, not {shown(name)}")
    if name == "oneshot":
        if rounds not in (None, 1):
            raise InvalidInput(f"rounds must be 1 with the schedule oneshot, not {rounds}")
        return OneShot(0.8 if sparsity is None else sparsity)
    rounds = steps("rounds", 12 if rounds is None else rounds)
    if sparsity is None and name == "exponential":
        return Exponential(rate=0.2, rounds=rounds)
    target: Sparsity = 1 - 0.8**rounds if sparsity is None else check_sparsity(sparsity)
    if name == "exponential":
        return Exponential(_each(lambda s: 1 - (1 - s) ** (1 / rounds), target), rounds)
    if name == "constant":
        return Constant(_each(lambda s: s / rounds, target), rounds)
    return SCHEDULES[name](target, rounds)  # type: ignore[call-arg]


SCHEDULES = {c.__name__.lower(): c for c in choices_on(Schedule)}
