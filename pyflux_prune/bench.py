"""Speed of the Julia engine side by side with what a user would otherwise take, alternating in one run."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import JustifyMethod
from rich.table import Table

from . import peers
from .architectures import mlp
from .choices import Layerwise, Magnitude, Sparsity, check_count, check_sparsity, listed
from .engines import get_engine
from .engines.julia import has_image
from .errors import InvalidInput
from .network import Network, prune

import torch  # isort: skip  # after peers, which says so where it is missing

SECONDS = 2e-3
"""What one measurement takes about, so that few are interrupted."""

PAUSE, PAUSE_OF_SEVERAL = 3e-2, 0.15
"""Before each, in which the threads of others come to rest; several of OpenBLAS take a tenth of a second."""

WAKING = 1e-2
"""Then, for as long about, the same is done without being measured, until its own threads are awake."""

MAX_CALLS = 1000
BATCHES = 20


@dataclass(frozen=True)
class Row:
    """One comparison: the best of several alternating repeats, in microseconds, and their ratio."""

    what: str
    batch: int
    sparsity: Sparsity
    peer: str
    ours_us: float
    peer_us: float

    @property
    def ratio(self) -> float:
        """The peer's time ÷ ours: above 1, ours is faster."""
        return self.peer_us / self.ours_us


@dataclass(frozen=True)
class Bench:
    """A table of comparisons and what they depend on."""

    network: str
    threads: int
    repeats: int
    rows: tuple[Row, ...]
    versions: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self) | {"rows": [asdict(r) | {"ratio": r.ratio} for r in self.rows]}

    def table(self) -> Table:
        """Return the comparisons as a table to print."""
        julia, torch, others = self.versions["julia"], self.versions["torch"], self.versions["peers"]
        shown = Table(
            title=f"{self.network}, threads {self.threads}, best of {self.repeats}",
            caption=f"{julia['processor']}\n"
            f"PrunableFlux {julia['PrunableFlux']}, Julia {julia['julia']}, {julia['blas']}\n"
            + ", ".join([f"PyTorch {torch['torch']} ({torch['blas']})", *(f"{n} {v}" for n, v in others.items())]),
            title_justify="left",
            caption_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        for heading in ("", "batch", "sparsity", "ours, µs", "peer", "µs", "÷ ours"):
            justify: JustifyMethod = "left" if heading in ("", "peer") else "right"
            shown.add_column(heading, justify=justify, no_wrap=True)
        for r in self.rows:
            times = f"{r.ours_us:.1f}", r.peer, f"{r.peer_us:.1f}", f"{r.ratio:.2f}"
            shown.add_row(r.what, str(r.batch), str(r.sparsity), *times)
        return shown


def bench(
    network: Sequence[int] | Network,
    *,
    batches: Sequence[int] = (64,),
    sparsities: Sequence[Sparsity] = (0.9,),
    threads: int = 1,
    repeats: int = 20,
    start_up: bool = False,
    runtimes: bool = False,
    deepsparse: str | None = None,
) -> Bench:
    """Time masked training steps (Adam) and inference of pruned networks, of each batch and sparsity.

    Training is compared with PyTorch's fused Adam and the masks of ``torch.nn.utils.prune``, and with plain Flux
    without masks. Inference, ``Network.sparsify``, is compared with PyTorch's dense and CSR matrices.

    Args:
        network: the widths of a multilayer perceptron, inputs first, or a network of your own.
        batches: how many samples a step takes.
        sparsities: to prune each layer to, by magnitude.
        threads: of all.
        repeats: of each measurement; the best counts.
        start_up: compare also how long it takes from the start of Python to the first trained batch.
        runtimes: compare inference also with those of ONNX Runtime and OpenVINO that are installed.
        deepsparse: compare it also with the DeepSparse of this Python interpreter.

    Raises:
        EngineUnavailable: one of the engines, or a peer that was asked for, cannot be had here.
        InvalidInput: network, batches or sparsities cannot be used, start-up is asked for without widths, or Julia
            runs with another number of threads already.

    """
    batches = [check_count("each of batches", n, 1) for n in listed(batches) or ()]
    rates = [check_sparsity(sparsity, "each of sparsities") for sparsity in listed(sparsities) or ()]
    if not batches or not rates:
        raise InvalidInput("batches and sparsities must hold one or more numbers each, not none")
    os.environ["PYTHON_JULIACALL_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(threads)
    julia = get_engine("julia").versions()
    if (julia["threads"], julia["blas_threads"]) != (threads, threads):
        raise InvalidInput(
            f"threads must be {julia['threads']}: Julia runs already, with {julia['threads']} threads and "
            f"{julia['blas_threads']} of BLAS"
        )
    torch.set_num_threads(threads)
    found = peers.installed() if runtimes else {}
    versions = {"julia": julia, "torch": get_engine("torch").versions(), "peers": dict(found)}
    rng, rows, pause = np.random.default_rng(0), list[Row](), PAUSE if threads == 1 else PAUSE_OF_SEVERAL
    if start_up:
        if isinstance(network, Network):
            raise InvalidInput("network must be the widths of a perceptron where start-up is measured")
        rows += [compare_starts(network, batch, threads, repeats) for batch in batches]
    whole = network.copy("julia") if isinstance(network, Network) else mlp(network, engine="julia")
    for sparsity in rates:
        net = prune(whole.copy(), Magnitude(), sparsity=sparsity, structure=Layerwise())
        fast = net.sparsify()
        for batch in batches:
            x = rng.random((batch * BATCHES, net.features), dtype=np.float32)
            y = rng.integers(0, net.outputs, len(x))
            training = {
                "PyTorch, masks": peers.torch_training(net, x, y, batch),
                "Flux, dense": peers.flux_training(net, x, y, batch),
            }
            ours: peers.Work = peers.masked_training(net, x, y, batch)
            rows += compare("training step", batch, sparsity, ours, training, repeats, pause, BATCHES)
            x = x[:batch]
            with peers.inference(net.parts, x, threads, list(found), deepsparse) as others:
                for name, work in others.items():
                    np.testing.assert_allclose(work.outputs(), net(x), rtol=1e-3, atol=1e-3, err_msg=name)
                    if isinstance(work, peers.DeepSparse):
                        versions["peers"][name] = work.version
                ours = peers.Calls(functools.partial(fast, x))
                rows += compare("inference", batch, sparsity, ours, others, repeats, pause)
    return Bench(whole.sketch, threads, repeats, tuple(rows), versions)


def compare_starts(sizes: Sequence[int], batch: int, threads: int, repeats: int) -> Row:
    """Start Python for us and for PyTorch in turn, over and over, and return the row of the best times."""
    works = [peers.Processes(script, sizes, batch, threads) for script in (peers.JULIA_START, peers.TORCH_START)]
    times = [[1e6 * work.seconds(1) for work in works] for _ in range(repeats)]
    ours, theirs = np.min(times, axis=0)
    what = "start-up, system image" if has_image() else "start-up"
    return Row(what, batch, 0.0, "PyTorch", float(ours), float(theirs))


def compare(
    what: str,
    batch: int,
    sparsity: Sparsity,
    ours: peers.Work,
    others: Mapping[str, peers.Work],
    repeats: int,
    pause: float,
    least: int = 1,
) -> list[Row]:
    """Measure our work and that of each peer in turn, over and over, and return the rows of the best times.

    Before each come ``pause`` seconds, and it takes ``least`` calls or more: what comes once should not count.
    """
    works = [ours, *others.values()]
    waking, calls = [], []
    for work in works:
        work.seconds(1)
        rate = 3 / work.seconds(3)
        waking.append(1 + int(WAKING * rate))
        calls.append(min(MAX_CALLS, max(least, 1 + int(SECONDS * rate))))
    best = [np.inf] * len(works)
    for _ in range(repeats):
        for i, work in enumerate(works):
            time.sleep(pause)
            work.seconds(waking[i])
            best[i] = min(best[i], 1e6 * work.seconds(calls[i]) / calls[i])
    return [Row(what, batch, sparsity, peer, best[0], us) for peer, us in zip(others, best[1:], strict=True)]
