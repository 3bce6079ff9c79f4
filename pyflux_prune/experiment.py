"""The round loop: train, prune, restart, train again, on either engine, with checkpoints and progress."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from . import report, rundir
from .choices import (
    Exponential,
    FineTune,
    Global,
    Layerwise,
    Magnitude,
    Reinitialize,
    Restart,
    Rewind,
    Saliency,
    Schedule,
    Sparsity,
    Structure,
    Training,
    check_choice,
    check_count,
    from_json,
    sparsities,
    to_json,
)
from .datasets import Dataset
from .engines import Layer, Model, get_engine
from .engines.base import Int
from .errors import InvalidInput
from .files import to_path
from .network import Network, glorot_uniform


@dataclass(frozen=True)
class Plan:
    """What an experiment does: a choice on each axis, how to train, and the seed of batches and new weights."""

    saliency: Saliency
    structure: Structure
    schedule: tuple[Sparsity, ...]
    finetune: FineTune
    training: Training
    seed: int

    def __post_init__(self) -> None:
        """Check every choice, so that nothing is trained for a plan that cannot be carried out."""
        check_choice("saliency", self.saliency, Saliency)
        check_choice("structure", self.structure, Structure)
        check_choice("finetune", self.finetune, Restart, type(None))
        check_choice("training", self.training, Training)
        check_count("seed", self.seed, 0)
        object.__setattr__(self, "schedule", tuple(sparsities(self.schedule)))

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v if k in ("schedule", "seed") else to_json(v) for k, v in values.items()}

    @staticmethod
    def from_json(value: dict[str, Any]) -> Plan:
        """Return the plan that ``to_json`` wrote; InvalidInput if it is none."""
        try:
            given = {f.name: value[f.name] for f in fields(Plan)}
        except (KeyError, TypeError) as error:
            raise InvalidInput(f"the plan of a run must be an object with {error}") from error
        return Plan(**{k: v if k in ("schedule", "seed") else from_json(v) for k, v in given.items()})


@dataclass(frozen=True)
class LayerDensity:
    """How much of a layer is left."""

    name: str
    density: float


@dataclass(frozen=True)
class Round:
    """The network at the end of a round; round 0 is the dense one.

    Attributes:
        round: 0 for the dense network, then 1, 2, ….
        sparsity: pruned ÷ all prunable weights.
        accuracy: share of test samples classified correctly.
        loss: mean cross-entropy on the test set.
        nonzero: prunable weights kept.
        seconds: wall-clock time of pruning, training and evaluation.
        layers: the density of each layer.

    """

    round: int
    sparsity: float
    accuracy: float
    loss: float
    nonzero: int
    seconds: float
    layers: tuple[LayerDensity, ...]


@dataclass
class Run:
    """An experiment, finished or under way.

    Attributes:
        network: the network as it is after the last round.
        data: the name of the data set.
        plan: the choices.
        parameters: weights and biases of the dense network.
        versions: of everything the numbers depend on.
        baseline: the trained dense network, round 0; None until it is trained.
        rounds: the rounds that are done.

    """

    network: Network
    data: str
    plan: Plan
    parameters: int
    versions: dict[str, Any]
    baseline: Round | None = None
    rounds: list[Round] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the weights as JSON values: what ``run.json`` holds."""
        baseline = None if self.baseline is None else asdict(self.baseline) | {"parameters": self.parameters}
        return {
            "engine": self.network.engine,
            "data": self.data,
            "seed": self.plan.seed,
            "baseline": baseline,
            "rounds": [asdict(r) for r in self.rounds],
            "plan": self.plan.to_json(),
            "versions": self.versions,
        }

    @staticmethod
    def from_json(value: dict[str, Any], network: Network) -> Run:
        """Return the run that ``to_json`` wrote; InvalidInput if it is none."""
        plan = Plan.from_json(value.get("plan", {}))
        try:
            first = dict(value["baseline"])
            parameters = first.pop("parameters")
            baseline, *rounds = [
                Round(**r | {"layers": tuple(LayerDensity(**la) for la in r["layers"])})
                for r in (first, *value["rounds"])
            ]
            return Run(network, value["data"], plan, parameters, value["versions"], baseline, rounds)
        except (KeyError, TypeError) as error:
            raise InvalidInput(f"the record of a run is damaged: {error}") from error

    def plot(self, path: str | PathLike[str]) -> None:
        """Write a picture of accuracy against the weights that are left; the ending (.png, .svg, …) says its kind.

        Raises:
            InvalidInput: the file cannot be written, or its kind is unknown.

        """
        report.plot(self, path)

    def save(self, directory: str | PathLike[str]) -> None:
        """Write ``run.json``, ``rounds.csv``, ``model.safetensors`` and ``curve.png`` to a new or empty directory.

        Raises:
            InvalidInput: the directory is not empty, or cannot be written.

        """
        folder = rundir.claim(directory)
        rundir.write(folder, self.to_json(), self.network.layers)
        self.plot(folder / rundir.CURVE)


def iterative_prune(
    net: Network,
    data: Dataset,
    *,
    saliency: Saliency = Magnitude(),
    structure: Structure = Global(),
    schedule: Schedule = Exponential(rate=0.2, rounds=12),
    finetune: FineTune = Rewind(),
    training: Training = Training(),
    seed: int = 0,
    out: str | PathLike[str] | None = None,
    progress: bool | None = None,
) -> Run:
    """Train ``net``, then round by round prune it, restart the survivors and train again.

    Args:
        net: the network; it is trained and pruned in place.
        data: what to train on, and to test on after each round.
        saliency: how much a weight matters.
        structure: what competes with what.
        schedule: how much goes at each round; any list of sparsities will do.
        finetune: what the survivors restart from; None prunes without training again.
        training: how each round is trained; every round begins with an empty optimiser memory.
        seed: of the order of the batches, and of new weights for ``Reinitialize``.
        out: a new or empty directory; after each round it holds the run so far, and ``resume`` goes on from it.
        progress: show a progress bar on stderr; by default, where that is a terminal.

    Returns:
        The run, with one ``Round`` per round.

    Raises:
        InvalidInput: an argument cannot be used. Nothing has changed then, and nothing has been written.
        Diverged: a training loss is not finite. Rounds that were done are in ``out``.

    """
    check_choice("net", net, Network)
    check_choice("data", data, Dataset)
    plan = Plan(saliency, structure, tuple(sparsities(schedule)), finetune, training, seed)
    check_fit(net, data, plan)
    folder = None if out is None else rundir.claim(out)
    parameters = sum(la.weight.size + (0 if la.bias is None else la.bias.size) for la in net.layers)
    run = Run(net, data.name, plan, parameters, get_engine(net.engine).versions())
    return _carry_out(run, data, folder, [], progress)


def resume(
    directory: str | PathLike[str], data: Dataset, *, engine: str | None = None, progress: bool | None = None
) -> Run:
    """Go on with a run that was cut short, from its last whole round, to the numbers it would have had.

    Args:
        directory: the ``out`` of the run.
        data: the data set of the run.
        engine: the engine of the run, unless another is named.
        progress: as for ``iterative_prune``.

    Raises:
        InvalidInput: there is no run there, it is damaged, or it is of other data.

    """
    folder = to_path(directory, "directory")
    record, layers, origin = rundir.read(folder)
    run = Run.from_json(record, Network(get_engine(engine or record["engine"]).build(layers)))
    if data.name != run.data:
        raise InvalidInput(f"data must be {run.data!r}, as when the run in {folder} began, not {data.name!r}")
    check_fit(run.network, data, run.plan, done=len(run.rounds))
    return _carry_out(run, data, folder, origin, progress)


def check_fit(net: Network, data: Dataset, plan: Plan, done: int = 0) -> None:
    """Raise InvalidInput unless the plan, but for rounds ``done``, fits this network and these data."""
    if data.features != net.features or data.classes > net.outputs:
        raise InvalidInput(
            f"data has {data.features} features and {data.classes} classes, but net takes {net.features} features "
            f"and has {net.outputs} outputs"
        )
    masks, layerwise = net.masks, isinstance(plan.structure, Layerwise)
    for many in (target for target in plan.schedule if isinstance(target, tuple)):
        if not layerwise or len(many) != len(masks):
            raise InvalidInput(
                f"schedule may hold {len(many)} sparsities per round only with Layerwise() and {len(many)} "
                f"prunable layers, not with {plan.structure} and {len(masks)}"
            )
    groups = masks if layerwise else [np.concatenate([m.ravel() for m in masks])]
    for following in plan.schedule[done : done + 1]:
        targets = following if isinstance(following, tuple) else (following,) * len(groups)
        for mask, target in zip(groups, targets, strict=True):
            if (pruned := int((~mask).sum())) > round(target * mask.size):
                raise InvalidInput(
                    f"schedule must not begin below what is pruned already, but asks for {target:g} of "
                    f"{mask.size} competing weights of net, of which {pruned} are pruned"
                )
    steps = plan.training.epochs * steps_per_epoch(len(data.y_train), plan.training)
    if isinstance(plan.finetune, Rewind) and plan.finetune.to > steps:
        raise InvalidInput(f"finetune must rewind to one of the {steps} training steps, not {plan.finetune.to}")


def _carry_out(run: Run, data: Dataset, folder: Path | None, origin: list[Layer], progress: bool | None) -> Run:
    """Do what is left of a run; ``origin`` is what survivors restart from, once the dense network is trained."""
    plan, model = run.plan, run.network.model

    def checkpoint() -> None:
        if folder is not None:
            restarts = isinstance(plan.finetune, (Rewind, Reinitialize))
            rundir.write(folder, run.to_json(), model.layers(), origin if restarts else [])

    with report.progress(len(plan.schedule), progress) as tick:
        if run.baseline is None:
            began = time.perf_counter()
            origin = train_round(model, data, plan, 0, tick)
            run.baseline = _measure(model, data, 0, began)
            checkpoint()
        for number in range(len(run.rounds) + 1, len(plan.schedule) + 1):
            began = time.perf_counter()
            model.prune(plan.saliency, plan.schedule[number - 1], plan.structure)
            restart(model, plan, origin, number)
            if plan.finetune is not None:
                train_round(model, data, plan, number, tick)
            run.rounds.append(_measure(model, data, number, began))
            checkpoint()
    if folder is not None:
        run.plot(folder / rundir.CURVE)
    return run


def train_round(
    model: Model, data: Dataset, plan: Plan, number: int, tick: report.Tick = report.silent
) -> list[Layer]:
    """Train for one round; return copies of the layers as they were at the step that survivors restart from."""
    training, n = plan.training, len(data.y_train)
    total = training.epochs * steps_per_epoch(n, training)
    restart_at = plan.finetune.to if isinstance(plan.finetune, Rewind) else 0
    origin, done = copies(model.layers()), 0
    model.start(training.optimiser)
    for epoch in range(training.epochs):
        order = batch_order(n, plan.seed, number, epoch)
        cut = (restart_at - done) * training.batchsize
        for part in (order[:cut], order[cut:]) if 0 < cut < n else (order,):
            told = partial(_tell, tick, number, done, total)
            model.train(data.x_train, data.y_train, part, training.batchsize, told)
            done += steps_per_epoch(len(part), training)
            if done == restart_at:
                origin = copies(model.layers())
    return origin


def _tell(tick: report.Tick, number: int, before: int, total: int, steps: int) -> None:
    tick(number, before + steps, total)


def steps_per_epoch(n: int, training: Training) -> int:
    """Return the number of batches that ``n`` samples make."""
    return -(-n // training.batchsize)


def batch_order(n: int, seed: int, number: int, epoch: int) -> Int:
    """Return the order in which an epoch of a round visits the ``n`` samples; the same on both engines."""
    return np.random.default_rng([seed, number, epoch]).permutation(n)


def copies(layers: list[Layer]) -> list[Layer]:
    """Return the layers with arrays of their own."""
    return [
        replace(la, weight=la.weight.copy(), mask=la.mask.copy(), bias=None if la.bias is None else la.bias.copy())
        for la in layers
    ]


def restart(model: Model, plan: Plan, origin: list[Layer], number: int) -> None:
    """Set the survivors of a round to what they restart from; ``origin`` is what ``train_round`` returned."""
    if isinstance(plan.finetune, (Rewind, Reinitialize)):
        start = [replace(then, mask=now.mask) for then, now in zip(origin, model.layers(), strict=True)]
        if isinstance(plan.finetune, Reinitialize):
            rng = np.random.default_rng([plan.seed, number])
            start = [replace(la, weight=glorot_uniform(rng, *la.weight.shape)) for la in start]
        model.load(start)


def _measure(model: Model, data: Dataset, number: int, began: float) -> Round:
    loss, accuracy = model.evaluate(data.x_test, data.y_test)
    layers = model.layers()
    nonzero, weights = sum(int(la.mask.sum()) for la in layers), sum(la.mask.size for la in layers)
    return Round(
        round=number,
        sparsity=1 - nonzero / weights,
        accuracy=accuracy,
        loss=loss,
        nonzero=nonzero,
        seconds=time.perf_counter() - began,
        layers=tuple(LayerDensity(la.name, la.density) for la in layers),
    )
