"""What the fields of choices are checked with, when a choice is made."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np

from ..errors import InvalidInput

Sparsity = float | tuple[float, ...]
"""One sparsity, or one per competing layer."""


class _Brief(reprlib.Repr):
    """As ``reprlib`` abbreviates, but long enough for a choice or a network."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring, self.maxother = 80, 200

    def repr_int(self, x: int, level: int) -> str:
        """Return the digits, which Python refuses to write where they are thousands."""
        return repr(x) if x.bit_length() < 128 else f"a whole number of {x.bit_length()} bits"


def shown(value: object) -> str:
    """Return what messages call a value that someone gave: on one line, abbreviated where it is long."""
    return " ".join(_Brief().repr(value).split())


def check_number(
    name: str, value: object, low: float, high: float, *, open_low: bool = False, otherwise: str = ""
) -> float:
    """Return a number in [low, high), or in (low, high) with ``open_low``, as a float.

    Raises InvalidInput for anything else; ``otherwise`` is what its message says to be allowed too.
    """
    if isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
        number = float(value)
        if low <= number < high and not (open_low and number == low):
            return number
    raise InvalidInput(
        f"{name} must be a number in {'(' if open_low else '['}{low:g}, {high:g}){otherwise}, not {shown(value)}"
    )


def check_sparsity(value: object, name: str = "sparsity") -> Sparsity:
    """Return a sparsity in [0, 1), or one per layer as a tuple; InvalidInput otherwise."""
    each = value.tolist() if isinstance(value, np.ndarray) else value
    if isinstance(each, Sequence) and not isinstance(each, str) and each:
        return tuple(check_number(name, one, 0, 1) for one in each)
    return check_number(name, each, 0, 1, otherwise=", or one per layer")


def check_count(name: str, value: object, low: int, *, below: int | None = None) -> int:
    """Return a whole number of at least ``low`` (and below ``below``); InvalidInput otherwise."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if whole and low <= value and (below is None or value < below):  # type: ignore[operator]
        return int(value)  # type: ignore[call-overload,no-any-return]
    limit = "" if below is None else f" and below {below}"
    raise InvalidInput(f"{name} must be a whole number of at least {low}{limit}, not {shown(value)}")


def check_choice(name: str, value: object, *kinds: type) -> None:
    """Raise InvalidInput unless ``value`` is an instance of one of ``kinds``, or a choice on such an axis."""
    allowed = [c for kind in kinds for c in kind.__subclasses__() or [kind]]
    if not isinstance(value, tuple(allowed)):
        *names, last = ("None" if c is type(None) else c.__name__ for c in allowed)
        raise InvalidInput(f"{name} must be {', '.join(names)}{' or ' if names else ''}{last}, not {shown(value)}")


def share(name: str, value: object) -> Any:
    """Return a share in [0, 1), or one per layer; InvalidInput otherwise."""
    return check_sparsity(value, name)


def number(low: float, high: float, *, open_low: bool = False) -> Callable[[str, object], Any]:
    """Return a check for a number in [low, high), or in (low, high)."""
    return lambda name, value: check_number(name, value, low, high, open_low=open_low)


def count(low: int, *, below: int | None = None) -> Callable[[str, object], Any]:
    """Return a check for a whole number of at least ``low``."""
    return lambda name, value: check_count(name, value, low, below=below)


def flag(name: str, value: object) -> bool:
    """Return True or False; InvalidInput for anything else."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise InvalidInput(f"{name} must be True or False, not {shown(value)}")


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
