"""Speed of the Julia engine side by side with PyTorch, alternating in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Table

from .architectures import mlp
from .choices import Adam, Global, Magnitude, Sparsity
from .engines import get_engine

REPEATS = 5


@dataclass(frozen=True)
class Row:
    """One measurement: the best of several alternating repeats, in milliseconds, and their ratio."""

    what: str
    julia: float
    torch: float

    @property
    def ratio(self) -> float:
        """How many times PyTorch's time Julia takes: below 1, Julia is faster."""
        return self.julia / self.torch


@dataclass(frozen=True)
class Bench:
    """A table of measurements and what they depend on."""

    network: tuple[int, ...]
    batch: int
    sparsity: Sparsity
    rows: tuple[Row, ...]
    versions: dict[str, dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self) | {"rows": [asdict(r) | {"ratio": r.ratio} for r in self.rows]}

    def table(self) -> Table:
        """Return the measurements as a table to print."""
        julia, torch = self.versions["julia"], self.versions["torch"]
        shown = Table(
            title=f"{'–'.join(map(str, self.network))}, batch {self.batch}, sparsity {self.sparsity}",
            caption=f"Julia {julia['julia']}, {julia['threads']} threads, BLAS {julia['blas_threads']}\n"
            f"PyTorch {torch['torch']}, {torch['threads']} threads",
            title_justify="left",
            caption_justify="left",
        )
        for heading in ("", "Julia, ms", "PyTorch, ms", "Julia ÷ PyTorch"):
            shown.add_column(heading, justify="right")
        for r in self.rows:
            shown.add_row(r.what, f"{r.julia:.3f}", f"{r.torch:.3f}", f"{r.ratio:.2f}")
        return shown


def bench(sizes: Sequence[int], *, batch: int, sparsity: Sparsity, steps: int) -> Bench:
    """Time a masked training step (Adam) and a forward pass of the same pruned network on both engines.

    PyTorch's is the reference engine, with the masks of ``torch.nn.utils.prune``.

    Raises:
        EngineUnavailable: one of the engines cannot be had here.
        InvalidInput: sizes or sparsity cannot be used.

    """
    engines = {name: get_engine(name) for name in ("julia", "torch")}
    layers = mlp(sizes, engine="torch").layers
    rng = np.random.default_rng(0)
    x = rng.random((batch * steps, sizes[0]), dtype=np.float32)
    y = rng.integers(0, sizes[-1], len(x))
    order = np.arange(len(x))
    models = {name: engine.build(layers) for name, engine in engines.items()}
    for model in models.values():
        model.prune(Magnitude(), sparsity, Global())
        model.start(Adam())

    def alternate(what: str, work: Callable[[str], object]) -> Row:
        best = dict.fromkeys(models, np.inf)
        for repeat in range(REPEATS + 1):
            for name in models:
                began = time.perf_counter()
                work(name)
                elapsed = 1e3 * (time.perf_counter() - began) / steps
                best[name] = min(best[name], elapsed) if repeat else np.inf
        return Row(what, float(best["julia"]), float(best["torch"]))

    batches = [x[at : at + batch] for at in range(0, len(x), batch)]
    rows = (
        alternate("training step", lambda name: models[name].train(x, y, order, batch)),
        alternate("forward pass", lambda name: [models[name].forward(b) for b in batches]),
    )
    return Bench(
        tuple(sizes), batch, sparsity, rows, {name: engine.versions() for name, engine in engines.items()}
    )
