"""Run directories: what is kept of an experiment after every round, and found again after a crash.

``model.safetensors`` holds weights, masks and, in its metadata, the whole record of the run, so that one atomic
rename moves the run from one round to the next. ``run.json`` and ``rounds.csv`` are that record for readers, and
``rewind.safetensors`` holds what the survivors restart from.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from .engines import Part
from .engines.parts import alike
from .errors import InvalidInput
from .files import atomic_write, is_temporary, json_text, read_model, to_path, write_model

RECORD, TABLE, MODEL, ORIGIN, CURVE = (
    "run.json",
    "rounds.csv",
    "model.safetensors",
    "rewind.safetensors",
    "curve.png",
)


def claim(directory: str | PathLike[str]) -> Path:
    """Return a path that is, or can be made, an empty directory to write to; make nothing yet.

    Empty is also one that holds no more than what a run leaves that is killed before its first round is whole.

    Raises:
        InvalidInput: it is not empty, is a file, or cannot be written.

    """
    folder = to_path(directory, "out")
    try:
        if folder.exists() and not folder.is_dir():
            raise InvalidInput(f"out must be a new or empty directory, but {folder} is a file")
        if folder.is_dir() and not all(p.name == ORIGIN or is_temporary(p) for p in folder.iterdir()):
            hint = "; resume (--resume) goes on with the run there" if (folder / MODEL).exists() else ""
            raise InvalidInput(f"out must be a new or empty directory, but {folder} is not empty{hint}")
        nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        with tempfile.TemporaryFile(dir=nearest):
            return folder
    except OSError as error:
        raise InvalidInput(
            f"out must be a directory that can be written, but {folder}: {error.strerror}"
        ) from error


def write(folder: Path, record: dict[str, Any], parts: Sequence[Part], origin: Sequence[Part] = ()) -> None:
    """Write the state of a run after a whole round; a crash at any moment leaves this state or the one before."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if origin and not (folder / MODEL).exists():
            write_model(folder / ORIGIN, origin)
        write_model(folder / MODEL, parts, extra={"run": json_text(record)})
        atomic_write(folder / RECORD, json_text(record, indent=2).encode() + b"\n")
        atomic_write(folder / TABLE, _table(record))
    except OSError as error:
        raise InvalidInput(f"out cannot be written: {folder}: {error.strerror}") from error


def read(folder: Path) -> tuple[Any, list[Part]]:
    """Return the record, JSON that is yet to be checked, and the network's parts.

    Raises:
        InvalidInput: there is no run in the directory, or it is damaged.

    """
    if not os.path.isfile(folder / MODEL):
        raise InvalidInput(f"{folder} holds no run to resume: there is no {MODEL}")
    parts, metadata = read_model(folder / MODEL)
    try:
        return json.loads(metadata["run"]), parts
    except (KeyError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{folder / MODEL} holds a model but not the record of a run") from error


def read_origin(folder: Path, parts: Sequence[Part]) -> list[Part]:
    """Return what the survivors of the run, a network of these parts, restart from.

    Raises:
        InvalidInput: it is missing, damaged, or of another network.

    """
    origin, _ = read_model(folder / ORIGIN)
    if not alike(origin, parts):
        raise InvalidInput(f"{folder / ORIGIN} does not belong to the run: its network is not that of {MODEL}")
    return origin


def _table(record: dict[str, Any]) -> bytes:
    """Return rounds.csv: one row per round, the dense network first, one column per layer's density."""
    text = io.StringIO()
    rows = [record["baseline"], *record["rounds"]]
    columns = ["round", "sparsity", "accuracy", "loss", "nonzero", "seconds"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns + [f"density {layer['name']}" for layer in rows[0]["layers"]])
    writer.writerows([r[c] for c in columns] + [layer["density"] for layer in r["layers"]] for r in rows)
    return text.getvalue().encode()
