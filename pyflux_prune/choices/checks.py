"""What the fields of choices are checked with, when a choice is made."""

from __future__ import annotations

import itertools
import math
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import numpy as np

from ..errors import InvalidInput

_T = TypeVar("_T")

MACHINE = 2**63
"""Whole numbers are below this: those of Julia and NumPy are of 64 bits."""

MANY = 1_000_000
"""More steps than these would not end, or not fit into memory."""

Sparsity = float | tuple[float, ...]
"""One sparsity, or one per competing layer."""


class _Brief(reprlib.Repr):
    """As ``reprlib`` abbreviates, but long enough for a choice or a network."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring, self.maxother = 80, 120

    def repr_int(self, x: int, level: int) -> str:
        """Return the digits, unless they are thousands, which Python refuses to write."""
        try:
            return super().repr_int(x, level)
        except ValueError:
            return f"a whole number of {x.bit_length()} bits"


def shown(value: object) -> str:
    """Return what messages call a value that someone gave: on one line, abbreviated where it is long."""
    return " ".join(_Brief().repr(value).split())


def plain(value: object) -> Any:
    """Return an array as lists, or as the number that it is; anything else as it is."""
    return value.tolist() if isinstance(value, np.ndarray) else value


def listed(value: object) -> tuple[Any, ...] | None:
    """Return the items of a sequence or an array; None for anything else, also for text."""
    items = plain(value)
    return tuple(items) if isinstance(items, Sequence) and not isinstance(items, (str, bytes)) else None


def check_number(
    name: str, value: object, low: float, high: float, *, open_low: bool = False, otherwise: str = ""
) -> float:
    """Return a number in [low, high), or in (low, high) with ``open_low``, as a float.

    Raises InvalidInput for anything else; ``otherwise`` is what its message says to be allowed too.
    """
    if isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.nan  # beyond all floats, and so in no interval of them
        if low <= number < high and not (open_low and number == low):
            return number
    raise InvalidInput(
        f"{name} must be a number in {'(' if open_low else '['}{low:g}, {high:g}){otherwise}, not {shown(value)}"
    )


def check_sparsity(value: object, name: str = "sparsity") -> Sparsity:
    """Return a sparsity in [0, 1), or one per layer as a tuple; InvalidInput otherwise."""
    if each := listed(value):
        return tuple(check_number(name, one, 0, 1) for one in each)
    return check_number(name, plain(value), 0, 1, otherwise=", or one per layer")


def check_count(name: str, value: object, low: int, *, below: int = MACHINE) -> int:
    """Return a whole number of at least ``low`` and below ``below``; InvalidInput otherwise."""
    limit = "" if below == MACHINE else f" and below {below}"
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        if low <= value < below:
            return int(value)
        limit = f" and below {below}" if value >= below else limit
    raise InvalidInput(f"{name} must be a whole number of at least {low}{limit}, not {shown(value)}")


def choices_on(axis: type[_T]) -> list[type[_T]]:
    """Return the choices on an axis, those of its module, as engines have no others; of another class itself."""
    return [c for c in axis.__subclasses__() if c.__module__ == axis.__module__] or [axis]


def check_choice(name: str, value: object, *kinds: type) -> None:
    """Raise InvalidInput unless ``value`` is an instance of one of ``kinds``, or a choice on such an axis."""
    allowed = list[type](itertools.chain(*map(choices_on, kinds)))
    # Engines know choices by their names; of anything else a subclass will do.
    known = type(value) in allowed if isinstance(value, Choice) else isinstance(value, tuple(allowed))
    if not known:
        *names, last = ("None" if c is type(None) else c.__name__ for c in allowed)
        raise InvalidInput(f"{name} must be {', '.join(names)}{' or ' if names else ''}{last}, not {shown(value)}")


def share(name: str, value: object) -> Any:
    """Return a share in [0, 1), or one per layer; InvalidInput otherwise."""
    return check_sparsity(value, name)


def number(low: float, high: float, *, open_low: bool = False) -> Callable[[str, object], Any]:
    """Return a check for a number in [low, high), or in (low, high)."""
    return lambda name, value: check_number(name, value, low, high, open_low=open_low)


def count(low: int, *, below: int = MACHINE) -> Callable[[str, object], Any]:
    """Return a check for a whole number of at least ``low`` and below ``below``."""
    return lambda name, value: check_count(name, value, low, below=below)


def flag(name: str, value: object) -> bool:
    """Return True or False; InvalidInput for anything else."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise InvalidInput(f"{name} must be True or False, not {shown(value)}")


steps = count(1, below=MANY)
positive = number(0, math.inf, open_low=True)


@dataclass(frozen=True)
class Choice:
    """A frozen dataclass whose fields are checked, and stored as their checks return them.

    A subclass names the check of each of its fields in the keywords of its class statement:
    ``class Rewind(Restart, to=count(0))``. A trailing underscore, as in ``lambda_``, is dropped in messages.
    """

    _checks: ClassVar[dict[str, Callable[[str, Any], Any]]] = {}

    def __init_subclass__(cls, **checks: Callable[[str, Any], Any]) -> None:
        """Take the checks of the fields that a subclass adds."""
        super().__init_subclass__()
        cls._checks = {**cls._checks, **checks}

    def __post_init__(self) -> None:
        """Check the fields."""
        for field in fields(self):
            name = field.name
            checked = self._checks[name](f"{type(self).__name__}'s {name.rstrip('_')}", getattr(self, name))
            object.__setattr__(self, name, checked)
