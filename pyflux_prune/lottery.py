"""The lottery-ticket experiment (Frankle & Carbin 2019, arXiv:1803.03635), with both of its controls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

from . import report
from .architectures import mlp
from .choices import (
    Exponential,
    Layerwise,
    Magnitude,
    Reinitialize,
    Rewind,
    Saliency,
    Sparsities,
    Structure,
    Training,
    check_choice,
    check_count,
    check_number,
    listed,
    shown,
    sparsities,
)
from .datasets import Dataset
from .engines import Model
from .engines.parts import Bool, copies, masked, prunable
from .errors import InvalidInput
from .experiment import Plan, Run, advance, begin, restart, train_round
from .network import Network

if TYPE_CHECKING:
    from rich.table import Table

Accuracies = tuple[float, ...]
"""Test accuracies, one per seed."""


@dataclass(frozen=True)
class TicketRound:
    """A round of the experiment: the accuracies of three networks of the same density in each layer, per seed.

    Attributes:
        round: 1, 2, ….
        density: kept ÷ all prunable weights, mean over seeds.
        ticket: the mask found by pruning, trained from the weights that it was rewound to.
        reinitialised: the same mask, trained from newly drawn initial weights.
        random_masks: the weights that the ticket is rewound to, under random masks of the same layers' densities.

    """

    round: int
    density: float
    ticket: Accuracies
    reinitialised: Accuracies
    random_masks: Accuracies


@dataclass(frozen=True)
class LotteryTicket:
    """What the experiment found.

    Attributes:
        data: the name of the data set.
        engine: the engine that computed.
        plan: the choices; its seed is the first.
        seeds: of initial weights and batches, one repetition each.
        tolerance: how far below the dense network's mean accuracy a ticket's may be to count as a winning one.
        dense: the accuracies of the dense network, per seed.
        rounds: the rounds of pruning.
        versions: of everything the numbers depend on.

    """

    data: str
    engine: str
    plan: Plan
    seeds: tuple[int, ...]
    tolerance: float
    dense: Accuracies
    rounds: tuple[TicketRound, ...]
    versions: dict[str, Any]

    @property
    def winning(self) -> TicketRound | None:
        """The round of least density whose ticket is within the tolerance of the dense network, or None."""
        won = [r for r in self.rounds if mean(r.ticket) >= mean(self.dense) - self.tolerance - 1e-12]
        return min(won, key=lambda r: r.density, default=None)

    @property
    def answer(self) -> str:
        """Whether there are winning tickets, and whether their weights and masks matter, in one sentence."""
        limit = f"{100 * self.tolerance:g} percentage points below the dense network's {mean(self.dense):.2%}"
        of = "one seed" if len(self.seeds) == 1 else f"means of {len(self.seeds)} seeds"
        if (won := self.winning) is None:
            best = max(self.rounds, key=lambda r: mean(r.ticket))
            return (
                f"Every ticket is more than {limit} test accuracy: the best, with {best.density:.1%} of the "
                f"weights, reaches {mean(best.ticket):.2%} ({of})."
            )
        again, masks = (_gap(won.ticket, control) for control in (won.reinitialised, won.random_masks))
        return (
            f"With {won.density:.1%} of the weights the ticket reaches {mean(won.ticket):.2%} test accuracy, no "
            f"more than {limit}; from new initial weights it ends {again}, and random masks on its own initial "
            f"weights {masks} ({of})."
        )

    def table(self) -> Table:
        """Return mean, least and greatest accuracy of each round as a table to print."""
        from rich.table import Table

        seeds = ", ".join(map(str, self.seeds))
        shown = Table(title=f"{self.data}, {self.engine} engine, seeds {seeds}", title_justify="left")
        for heading in _HEADINGS:
            shown.add_column(heading, justify="right")
        for row in self._rows():
            shown.add_row(*row)
        return shown

    def markdown(self) -> str:
        """Return the table as Markdown, one line per round."""
        lines = [_HEADINGS, ["--:"] * len(_HEADINGS), *self._rows()]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {f: v for f, v in asdict(self).items() if f != "plan"} | {
            "plan": self.plan.to_json(),
            "answer": self.answer,
        }

    def _rows(self) -> list[list[str]]:
        rows = [["100.0%", _spread(self.dense), "", ""]]
        for r in self.rounds:
            rows.append([f"{r.density:.1%}", *map(_spread, (r.ticket, r.reinitialised, r.random_masks))])
        return rows


_HEADINGS = ["weights kept", "ticket", "new initial weights", "random masks"]


def _spread(accuracies: Accuracies) -> str:
    """Return the mean, and where there are several the range."""
    extremes = f" ({min(accuracies):.2%}–{max(accuracies):.2%})" if len(accuracies) > 1 else ""
    return f"{mean(accuracies):.2%}{extremes}"


def _gap(ticket: Accuracies, control: Accuracies) -> str:
    points = 100 * (mean(ticket) - mean(control))
    return f"{abs(points):.2f} points {'lower' if points >= 0 else 'higher'}"


def lottery_ticket(
    net: Network | Sequence[int] | Callable[[int], Network],
    data: Dataset,
    *,
    saliency: Saliency = Magnitude(),
    structure: Structure = Layerwise(),
    schedule: Sparsities = Exponential(rate=0.2, rounds=12),
    finetune: Rewind = Rewind(),
    training: Training = Training(),
    seeds: Sequence[int] = (0, 1, 2),
    tolerance: float = 0.005,
    engine: str = "auto",
    progress: bool | None = None,
) -> LotteryTicket:
    """Find out whether rewound sparse networks train as well as the dense one, and what that takes.

    For each seed it runs ``iterative_prune`` with rewinding, and in each round trains two more networks over the
    same batches, of the same density in each layer: the ticket's mask on new initial weights, and random masks
    on the weights that the ticket is rewound to. That is three trainings per round and seed.

    Args:
        net: the sizes of a network, made by ``mlp`` with each seed; a function that makes one of a seed, such as
            ``lambda seed: lenet5(seed=seed)``; or a network, which is left as it is: then seeds only differ in the
            batches and in what the controls draw.
        data: what to train on, and to test on.
        saliency: as for ``iterative_prune``.
        structure: as for ``iterative_prune``.
        schedule: as for ``iterative_prune``.
        finetune: the step to rewind to; ``Rewind(to=k)`` for k > 0 is late rewinding.
        training: how each network is trained.
        seeds: of initial weights, batches and controls; one repetition each.
        tolerance: how far below the dense network, in [0, 1), a ticket may be and win.
        engine: "auto", "julia" or "torch", for networks that are made of sizes.
        progress: show progress bars on stderr; by default, where that is a terminal.

    Raises:
        InvalidInput: an argument cannot be used; nothing is trained then.
        EngineUnavailable: the engine cannot be had here.
        Diverged: a training loss, or at the end a weight, is not finite.

    """
    check_choice("finetune", finetune, Rewind)
    check_number("tolerance", tolerance, 0, 1)
    chosen = tuple(check_count("each of seeds", seed, 0) for seed in listed(seeds) or ())
    if not chosen or len(set(chosen)) < len(chosen):
        raise InvalidInput(f"seeds must be one or more different whole numbers, not {shown(seeds)}")
    plan = Plan(saliency, structure, tuple(sparsities(schedule)), finetune, training, chosen[0])

    def network(seed: int) -> Network:
        if isinstance(net, Network):
            return net.copy()
        return net(seed) if callable(net) else mlp(net, seed=seed, engine=engine)

    runs, controls = [], []
    for i, seed in enumerate(chosen, start=1):
        run = begin(network(seed), data, replace(plan, seed=seed))
        with report.progress(len(plan.schedule), progress, f"seed {i} of {len(chosen)}: ") as tick:
            controls.append(list(_controls(run, data, tick)))
        runs.append(run)
    rounds = [
        TicketRound(
            round=k + 1,
            density=mean(1 - run.rounds[k].sparsity for run in runs),
            ticket=tuple(run.rounds[k].accuracy for run in runs),
            reinitialised=tuple(accuracies[k][0] for accuracies in controls),
            random_masks=tuple(accuracies[k][1] for accuracies in controls),
        )
        for k in range(len(plan.schedule))
    ]
    dense = tuple(run.baseline.accuracy for run in runs if run.baseline is not None)
    first = runs[0]
    return LotteryTicket(
        data.name, first.network.engine, plan, chosen, tolerance, dense, tuple(rounds), first.versions
    )


def _controls(run: Run, data: Dataset, tick: report.Tick) -> Iterator[tuple[float, float]]:
    """Carry out a run; after each round, yield the accuracies of its mask on new weights, and of random masks."""
    plan = replace(run.plan, finetune=Reinitialize())
    initial, other = copies(run.network.model.parts()), run.network.copy().model
    for origin in advance(run, data, [], _third(tick, 0)):
        if number := len(run.rounds):
            masks = run.network.masks
            other.load(masked(initial, masks))
            restart(other, plan, initial, number)
            reinitialised = _trained(other, data, plan, number, _third(tick, 1))
            rng = np.random.default_rng([plan.seed, number, 0, 1])
            drawn = [_shuffled(rng, la.mask, mask) for la, mask in zip(prunable(origin), masks, strict=True)]
            other.load(masked(origin, drawn))
            yield reinitialised, _trained(other, data, plan, number, _third(tick, 2))


def _trained(model: Model, data: Dataset, plan: Plan, number: int, tick: report.Tick) -> float:
    train_round(model, data, plan, number, tick)
    return model.evaluate(data.x_test, data.y_test)[1]


def _shuffled(rng: np.random.Generator, among: Bool, mask: Bool) -> Bool:
    """Return a mask that keeps as many weights as ``mask``, anywhere among those that the first keeps."""
    drawn = among.copy()
    drawn[among] = rng.permutation(mask[among])
    return drawn


def _third(tick: report.Tick, part: int) -> report.Tick:
    """Return what reports the progress of the first, second or third training of a round."""
    return lambda number, done, total: tick(number, part * total + done, 3 * total)
