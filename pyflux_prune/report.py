"""What a person sees of a run: progress, a table, a curve."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from os import PathLike
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from .errors import InvalidInput
from .files import to_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .experiment import Run
    from .sensitivity import Sensitivity

Tick = Callable[[int, int, int], None]
"""Told the round, how many of its steps are done, and how many it has."""


def silent(number: int, done: int, total: int) -> None:
    """Show nothing."""


@contextlib.contextmanager
def progress(rounds: int, wanted: bool | None = None, label: str = "") -> Iterator[Tick]:
    """Show a bar on stderr for ``rounds`` rounds after the dense network; by default, where that is a terminal."""
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield silent
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(f"{label}step 0", total=rounds + 1)

        def tick(number: int, done: int, total: int) -> None:
            first = "dense network, " if rounds else ""
            name = f"round {number} of {rounds}, " if number else first
            bars.update(task, completed=number + done / total, description=f"{label}{name}step {done} of {total}")

        yield tick


def table(run: Run) -> Table:
    """Return the rounds of a run as a table to print."""
    shown = Table(title=f"{run.data}, {run.network.engine} engine, seed {run.plan.seed}", title_justify="left")
    for heading in ("round", "sparsity", "weights kept", "accuracy", "loss", "seconds"):
        shown.add_column(heading, justify="right")
    for r in [*([run.baseline] if run.baseline else []), *run.rounds]:
        shown.add_row(
            str(r.round) if r.round else run.plan.beginning,
            f"{r.sparsity:.1%}",
            f"{r.nonzero:,}",
            f"{r.accuracy:.2%}",
            f"{r.loss:.4f}",
            f"{r.seconds:.1f}",
        )
    return shown


def plot(run: Run, path: str | PathLike[str]) -> None:
    """Write a picture of test accuracy against the share of weights kept.

    Raises:
        InvalidInput: the file cannot be written, or its kind is unknown.

    """
    from matplotlib.figure import Figure

    if run.baseline is None:
        raise InvalidInput("run has no rounds to plot yet")
    rows = [run.baseline, *run.rounds]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(100 * run.baseline.accuracy, color="0.7", linestyle="--", label=f"{run.plan.beginning} network")
    axes.plot([100 * (1 - r.sparsity) for r in rows], [100 * r.accuracy for r in rows], "o-", label="pruned")
    axes.set_xscale("log")
    axes.invert_xaxis()
    ticks = [t for t in (100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1) if t >= 50 * (1 - rows[-1].sparsity)]
    axes.set_xticks(ticks, [f"{t:g} %" for t in ticks])
    axes.minorticks_off()
    axes.set(xlabel="weights kept", ylabel="test accuracy (%)", title=f"{run.data}: {run.plan.finetune}")
    axes.legend(frameon=False)
    _write(figure, path)


def plot_sensitivity(result: Sensitivity, path: str | PathLike[str]) -> None:
    """Write a picture of test accuracy against the sparsity of one layer, a curve per layer.

    Raises:
        InvalidInput: the file cannot be written, or its kind is unknown.

    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(100 * result.baseline, color="0.7", linestyle="--", label="as it is")
    for name, row in zip(result.layers, result.accuracy, strict=True):
        axes.plot([100 * rate for rate in result.rates], 100 * row, "o-", label=f"layer {name}")
    axes.set(xlabel="pruned of one layer (%)", ylabel="test accuracy (%)", title=result.data)
    axes.legend(frameon=False)
    _write(figure, path)


def _write(figure: Figure, path: str | PathLike[str]) -> None:
    target = to_path(path)
    try:
        figure.savefig(target, dpi=150)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"the plot cannot be written to {path}: {error}") from error
