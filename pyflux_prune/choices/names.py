"""Choices as text, for the command line, and as JSON, for files."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from ..errors import InvalidInput
from .checks import Choice, choices_on, shown
from .finetune import Restart
from .regrow import Regrowth
from .saliency import Saliency
from .schedule import Schedule
from .structure import Structure
from .training import Optimiser, Training


def by_name(axis: str, classes: dict[str, type[Any]], text: str) -> Any:
    """Return the choice that text such as ``taylor`` or ``taylor:squared=false,batchsize=32`` names.

    Fields of a ``Training`` inside count as fields of the choice: ``movement:epochs=3``.

    Raises:
        InvalidInput: no such choice, no such field, or a value that the field does not allow.

    """
    name, _, options = text.partition(":")
    if name not in classes:
        raise InvalidInput(f"{axis} must be one of {', '.join(classes)}, not {shown(name)}")
    choice = classes[name]()
    parts = {"": choice} | {k: v for k, v in _items(choice) if isinstance(v, Choice)}
    owner = {k: part for part in parts for k, v in _items(parts[part]) if not isinstance(v, Choice)}
    given: dict[str, dict[str, Any]] = {part: {} for part in parts}
    for option in filter(None, options.split(",")):
        field, equals, value = option.partition("=")
        if field not in owner or not equals:
            allowed = ", ".join(f"{k}=…" for k in owner) or "no options"
            raise InvalidInput(f"{axis} {name} takes {allowed}, not {shown(option)}")
        given[owner[field]][field] = _value(value)
    inner = {part: replace(parts[part], **given[part]) for part in parts if part}
    return replace(choice, **given[""], **inner)


def _items(choice: Any) -> list[tuple[str, Any]]:
    """Return the names and values of a choice's fields."""
    return [(f.name, getattr(choice, f.name)) for f in fields(choice)]


def _value(text: str) -> Any:
    """Read a number, true or false, or numbers with slashes, as in 0/-1; text that is none of these stays text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for read in (int, float, lambda t: tuple(int(part) for part in t.split("/"))):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def to_json(choice: object) -> Any:
    """Return a choice as JSON values: an object with the name of its class and its fields; None stays None."""
    if choice is None:
        return None
    return {"name": type(choice).__name__} | {
        name: to_json(value) if isinstance(value, Choice) else value for name, value in _items(choice)
    }


def from_json(value: Any) -> Any:
    """Return the choice that ``to_json`` wrote; InvalidInput where no such choice exists."""
    if value is None:
        return None
    axes: tuple[type[Choice], ...] = (Saliency, Structure, Schedule, Restart, Regrowth, Optimiser, Training)
    classes = {c.__name__: c for axis in axes for c in choices_on(axis)}
    try:
        given = {k: from_json(v) if isinstance(v, dict) else v for k, v in value.items() if k != "name"}
        return classes[value["name"]](**given)
    except (AttributeError, KeyError, TypeError) as error:
        raise InvalidInput(f"{shown(value)} is not a choice that this version knows") from error
