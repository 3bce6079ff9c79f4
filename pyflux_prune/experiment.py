"""The round loop: train, prune, restart, train again, on either engine, with checkpoints and progress."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from . import report, rundir
from .architectures import glorot_uniform
from .choices import (
    Choice,
    Continue,
    EdgePopup,
    Exponential,
    FineTune,
    Global,
    Magnitude,
    Movement,
    Reinitialize,
    Restart,
    Rewind,
    Saliency,
    Sparsities,
    Sparsity,
    Structure,
    Training,
    check_choice,
    check_count,
    check_match,
    check_number,
    flag,
    from_json,
    shown,
    sparsities,
    to_json,
)
from .datasets import Dataset
from .engines import Layer, Model, check_engine, get_engine
from .engines.base import check_saliency
from .engines.parts import Int, Part, arrays, check_batches, copies, masked
from .errors import Diverged, InvalidInput, LayerCollapse
from .files import naming, to_path
from .network import Network, build, check_dataset


@dataclass(frozen=True)
class Plan:
    """What an experiment does: a choice on each axis, how to train, and the seed of batches and new weights.

    Attributes:
        saliency: how much a weight matters.
        structure: what competes with what.
        schedule: the target sparsity of each round.
        finetune: what the survivors restart from.
        training: how each round is trained.
        seed: of the order of the batches, and of new weights.
        pretrain: whether the network is trained before round 1.
        every: steps between prunings, where all rounds are parts of one training; None where each has its own.

    """

    saliency: Saliency
    structure: Structure
    schedule: tuple[Sparsity, ...]
    finetune: FineTune
    training: Training
    seed: int
    pretrain: bool = True
    every: int | None = None

    def __post_init__(self) -> None:
        """Check every choice, so that nothing is trained for a plan that cannot be carried out."""
        check_choice("saliency", self.saliency, Saliency)
        check_choice("structure", self.structure, Structure)
        check_match(self.saliency, self.structure)
        check_choice("finetune", self.finetune, Restart, type(None))
        check_choice("training", self.training, Training)
        checked = {
            "schedule": tuple(sparsities(self.schedule)),
            "seed": check_count("seed", self.seed, 0),
            "pretrain": flag("pretrain", self.pretrain),
            "every": None if self.every is None else check_count("every", self.every, 1),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if not self.pretrain and isinstance(self.finetune, Rewind) and self.finetune.to:
            raise InvalidInput(f"finetune must be Rewind(to=0) where pretrain is False, not {self.finetune!r}")
        if isinstance(self.saliency, EdgePopup):
            scored = [max(s) if isinstance(s, tuple) else s for s in self.schedule[:-1]]
            if any(s > self.saliency.sparsity for s in scored):
                raise InvalidInput(
                    f"EdgePopup's sparsity must be at least that of the last network it scores, {scored[-1]:g}, "
                    f"not {self.saliency.sparsity:g}"
                )

    @property
    def beginning(self) -> str:
        """What the network of round 0 is."""
        return "dense" if self.pretrain else "untrained"

    def trains(self, number: int) -> bool:
        """Return whether a round trains the network."""
        return self.pretrain if number == 0 else self.finetune is not None

    def eta(self, number: int, epoch: int) -> float:
        """Return the learning rate of an epoch of a round; ``Continue`` stays where the first training ended."""
        first = 0 if self.pretrain else 1
        stays = isinstance(self.finetune, Continue) and number > first
        return self.training.eta(self.training.epochs - 1 if stays else epoch)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: to_json(v) if isinstance(v, Choice) else v for k, v in values.items()}

    @staticmethod
    def from_json(value: object) -> Plan:
        """Return the plan that ``to_json`` wrote; InvalidInput if it is none."""
        given = _held("the plan of a run", value, *(f.name for f in fields(Plan)))
        return Plan(*(from_json(v) if isinstance(v, dict) else v for v in given))


@dataclass(frozen=True)
class LayerDensity:
    """How much of a layer is left."""

    name: str
    density: float

    @staticmethod
    def from_json(value: object) -> LayerDensity:
        """Return what JSON holds; InvalidInput if it is none."""
        name, density = _held("a layer", value, "name", "density")
        return LayerDensity(_typed("a layer's name", name, str), check_number("density", density, 0, math.inf))


@dataclass(frozen=True)
class Round:
    """The network at the end of a round; round 0 comes before the first pruning.

    Attributes:
        round: 0 before the first pruning, then 1, 2, ….
        sparsity: pruned ÷ all prunable weights.
        accuracy: share of test samples classified correctly.
        loss: mean cross-entropy on the test set; in files, null where it is not finite.
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

    @staticmethod
    def from_json(value: object) -> Round:
        """Return the round that JSON holds; InvalidInput if it is none."""
        given = _held("a round", value, *(f.name for f in fields(Round)))
        number, sparsity, accuracy, loss, nonzero, seconds, layers = given
        return Round(
            check_count("round", number, 0),
            check_number("sparsity", sparsity, 0, math.inf),
            check_number("accuracy", accuracy, 0, math.inf),
            math.nan if loss is None else check_number("loss", loss, 0, math.inf),
            check_count("nonzero", nonzero, 0),
            check_number("seconds", seconds, 0, math.inf),
            tuple(map(LayerDensity.from_json, _typed("a round's layers", layers, list))),
        )


@dataclass
class Run:
    """An experiment, finished or under way.

    Attributes:
        network: the network as it is after the last round.
        data: the name of the data set.
        fingerprint: that of the data set.
        plan: the choices.
        parameters: weights and biases of the dense network, those of batch normalisation too.
        versions: of everything the numbers depend on.
        baseline: round 0, the network before the first pruning; None until that is done.
        rounds: the rounds that are done.

    """

    network: Network
    data: str
    fingerprint: str
    plan: Plan
    parameters: int
    versions: dict[str, Any]
    baseline: Round | None = None
    rounds: list[Round] = field(default_factory=list)

    def add(self, done: Round) -> None:
        """Add the round that is done."""
        if done.round:
            self.rounds.append(done)
        else:
            self.baseline = done

    def to_json(self) -> dict[str, Any]:
        """Return everything but the weights as JSON values: what ``run.json`` holds."""
        baseline = None if self.baseline is None else asdict(self.baseline) | {"parameters": self.parameters}
        return {
            "engine": self.network.engine,
            "data": self.data,
            "fingerprint": self.fingerprint,
            "seed": self.plan.seed,
            "baseline": baseline,
            "rounds": [asdict(r) for r in self.rounds],
            "plan": self.plan.to_json(),
            "versions": self.versions,
        }

    @staticmethod
    def from_json(value: object, parts: Sequence[Part], engine: str | None = None) -> Run:
        """Return the run that ``to_json`` wrote, its network of these parts; InvalidInput if it is none.

        The network is on the engine of the run, unless another is named.
        """
        names = ("engine", "data", "fingerprint", "plan", "versions", "baseline", "rounds")
        own, data, fingerprint, plan, versions, first, others = _held("the record of a run", value, *names)
        check_engine(own)
        made, (parameters,) = Plan.from_json(plan), _held("the baseline", first, "parameters")
        baseline, *rounds = map(Round.from_json, (first, *_typed("rounds", others, list)))
        last = len(made.schedule)
        if [r.round for r in (baseline, *rounds)] != list(range(last + 1))[: len(rounds) + 1]:
            raise InvalidInput(f"rounds must be 1, 2, … up to {last}, the last of the schedule")
        return Run(
            build(parts, engine or own),
            _typed("data", data, str),
            _typed("fingerprint", fingerprint, str),
            made,
            check_count("parameters", parameters, 1),
            _typed("versions", versions, dict),
            baseline,
            rounds,
        )

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
        rundir.write(folder, self.to_json(), self.network.parts)
        self.plot(folder / rundir.CURVE)


def _held(what: str, value: object, *names: str) -> list[Any]:
    """Return what a JSON object holds under these names; InvalidInput unless it is one that holds them."""
    if isinstance(value, dict) and value.keys() >= set(names):
        return [value[name] for name in names]
    raise InvalidInput(f"{what} must be an object with {', '.join(names)}, not {shown(value)}")


def _typed(what: str, value: object, kind: type) -> Any:
    """Return a value of JSON; InvalidInput unless it is of this type."""
    if type(value) is kind:
        return value
    raise InvalidInput(f"{what} must be of the type {kind.__name__}, not {shown(value)}")


def iterative_prune(
    net: Network,
    data: Dataset,
    *,
    saliency: Saliency = Magnitude(),
    structure: Structure = Global(),
    schedule: Sparsities = Exponential(rate=0.2, rounds=12),
    finetune: FineTune = Rewind(),
    training: Training = Training(),
    seed: int = 0,
    pretrain: bool = True,
    out: str | PathLike[str] | None = None,
    progress: bool | None = None,
) -> Run:
    """Train ``net``, then round by round prune it, restart the survivors and train again.

    Args:
        net: the network; it is trained and pruned in place.
        data: what to train on, and to test on after each round; criteria that need data get all training samples.
        saliency: how much a weight matters.
        structure: what competes with what.
        schedule: how much goes at each round; any list of sparsities will do.
        finetune: what the survivors restart from; None prunes without training again.
        training: how each round is trained; every round begins with an empty optimiser memory.
        seed: of the order of the batches, and of new weights for ``Reinitialize``.
        pretrain: False prunes the network as it is, and trains it only then: for ``SNIP``, ``GraSP``, ``SynFlow``
            and ``EdgePopup``, which score initial weights.
        out: a new or empty directory; after each round it holds the run so far, and ``resume`` goes on from it.
        progress: show a progress bar on stderr; by default, where that is a terminal.

    Returns:
        The run, with one ``Round`` per round.

    Raises:
        InvalidInput: an argument cannot be used. Nothing has changed then, and nothing has been written.
        Diverged: a training loss, or at the end a weight, is not finite. Rounds that were done are in ``out``.

    """
    plan = Plan(saliency, structure, tuple(sparsities(schedule)), finetune, training, seed, pretrain)
    run = begin(net, data, plan)
    folder = None if out is None else rundir.claim(out)
    return _carry_out(run, data, folder, [], progress)


def resume(
    directory: str | PathLike[str], data: Dataset, *, engine: str | None = None, progress: bool | None = None
) -> Run:
    """Go on with a run of ``iterative_prune`` that was cut short, to the numbers it would have had.

    Args:
        directory: the ``out`` of the run.
        data: the data set of the run.
        engine: the engine of the run, unless another is named.
        progress: as for ``iterative_prune``.

    Raises:
        InvalidInput: there is no run there, it is damaged, or it is of other samples.

    """
    folder = to_path(directory, "directory")
    check_choice("data", data, Dataset)
    if engine is not None:
        check_engine(engine)
    record, parts = rundir.read(folder)
    with naming(folder / rundir.MODEL):
        run = Run.from_json(record, parts, engine)
    if run.plan.every is not None:
        raise InvalidInput(f"directory must hold a run of iterative_prune; that in {folder} is of gradual_prune")
    if data.fingerprint != run.fingerprint:
        raise InvalidInput(
            f"data must be that which the run in {folder} began with, {run.data!r}, but {data.name!r} holds other "
            "samples"
        )
    finetune = run.plan.finetune
    origin = rundir.read_origin(folder, parts) if finetune and finetune.goes_back else []
    check_fit(run.network, data, run.plan, done=len(run.rounds))
    return _carry_out(run, data, folder, origin, progress)


def begin(net: Network, data: Dataset, plan: Plan) -> Run:
    """Return a run with nothing done yet; InvalidInput unless the plan fits the network and the data."""
    check_fit(net, data, plan)
    trained = [arrays(part).get(name) for part in net.parts for name in ("weight", "bias")]
    parameters = sum(array.size for array in trained if array is not None)
    return Run(net, data.name, data.fingerprint, plan, parameters, get_engine(net.engine).versions())


def check_fit(net: Network, data: Dataset, plan: Plan, done: int = 0) -> None:
    """Raise InvalidInput unless the plan, but for rounds ``done``, fits this network and these data.

    The engine's own rules decide: on a copy, the criterion scores the network as it is (untrained, where the
    criterion trains), and each target is pruned to by magnitude.
    """
    samples = check_dataset(net, data)
    steps = plan.training.epochs * steps_per_epoch(len(data.y_train), plan.training)
    if isinstance(plan.finetune, Rewind) and plan.finetune.to > steps:
        raise InvalidInput(f"finetune must rewind to one of the {steps} training steps, not {plan.finetune.to}")
    if plan.training.epochs:
        check_batches(net.parts, len(data.y_train), plan.training.batchsize, "training's")
    check_saliency(plan.saliency, net.parts, samples)
    targets, parts, trial = plan.schedule[done:], net.parts, net.copy().model
    with naming("this cannot be pruned as asked"), warnings.catch_warnings():
        warnings.simplefilter("ignore", LayerCollapse)
        for target in targets:
            trial.load(parts)
            trial.prune(Magnitude(), target, plan.structure)
        if targets:
            trial.load(parts)
            trial.scores(_without_training(plan.saliency), samples)


def _without_training(saliency: Saliency) -> Saliency:
    if isinstance(saliency, (Movement, EdgePopup)):
        return replace(saliency, training=replace(saliency.training, epochs=0))
    return saliency


def _carry_out(run: Run, data: Dataset, folder: Path | None, origin: Sequence[Part], progress: bool | None) -> Run:
    """Do what is left of a run, and write it to ``folder`` after each round."""
    finetune = run.plan.finetune
    with report.progress(len(run.plan.schedule), progress) as tick:
        for start in advance(run, data, origin, tick):
            if folder is not None:
                goes_back = finetune is not None and finetune.goes_back
                rundir.write(folder, run.to_json(), run.network.parts, start if goes_back else [])
    if folder is not None:
        run.plot(folder / rundir.CURVE)
    return run


def advance(
    run: Run, data: Dataset, origin: Sequence[Part], tick: report.Tick = report.silent
) -> Iterator[list[Part]]:
    """Do what is left of a run; after each round, yield the parts that survivors go back to.

    ``origin`` holds those parts, once round 0 is done.
    """
    origin = list(origin)
    plan, model = run.plan, run.network.model
    for number in range(0 if run.baseline is None else len(run.rounds) + 1, len(plan.schedule) + 1):
        began = time.perf_counter()
        if number:
            model.prune(plan.saliency, plan.schedule[number - 1], plan.structure, (data.x_train, data.y_train))
            restart(model, plan, origin, number)
        start = train_round(model, data, plan, number, tick) if plan.trains(number) else copies(model.parts())
        run.add(evaluate(model, data, number, began))
        origin = origin if number else start
        yield origin


def train_round(
    model: Model, data: Dataset, plan: Plan, number: int, tick: report.Tick = report.silent
) -> list[Part]:
    """Train for one round; return copies of the parts as they were at the step that survivors restart from."""
    origin = copies(model.parts())
    restart_at = plan.finetune.to if isinstance(plan.finetune, Rewind) else 0
    for _ in train(model, data, plan.training, plan.seed, number, partial(plan.eta, number), [restart_at], tick):
        origin = copies(model.parts())
    return origin


def train(
    model: Model,
    data: Dataset,
    training: Training,
    seed: int,
    number: int,
    eta: Callable[[int], float],
    pauses: Sequence[int],
    tick: report.Tick = report.silent,
) -> Iterator[int]:
    """Train from an empty optimiser memory over the batches of a round, and yield after each step in ``pauses``.

    ``eta`` says the learning rate of an epoch; ``pauses`` go up, and there is none before the first step.
    """
    n, size = len(data.y_train), training.batchsize
    epoch_steps = steps_per_epoch(n, training)
    model.start(training.optimiser)
    for epoch in range(training.epochs):
        model.adjust(eta(epoch))
        order, first = batch_order(n, seed, number, epoch), epoch * epoch_steps
        inside = [p for p in pauses if first < p < first + epoch_steps]
        for begun, end in pairwise([first, *inside, first + epoch_steps]):
            told = partial(_tell, tick, number, begun, training.epochs * epoch_steps)
            part = order[(begun - first) * size : (end - first) * size]
            model.train(data.x_train, data.y_train, part, size, told)
            if end in pauses:
                yield end


def _tell(tick: report.Tick, number: int, before: int, total: int, steps: int) -> None:
    tick(number, before + steps, total)


def steps_per_epoch(n: int, training: Training) -> int:
    """Return the number of batches that ``n`` samples make."""
    return -(-n // training.batchsize)


def batch_order(n: int, seed: int, number: int, epoch: int) -> Int:
    """Return the order in which an epoch of a round visits the ``n`` samples; the same on both engines."""
    return np.random.default_rng([seed, number, epoch]).permutation(n)


def restart(model: Model, plan: Plan, origin: Sequence[Part], number: int) -> None:
    """Set the survivors of a round to what they restart from; ``origin`` is what ``train_round`` returned."""
    if plan.finetune is not None and plan.finetune.goes_back:
        start = masked(origin, [layer.mask for layer in model.layers()])
        if isinstance(plan.finetune, Reinitialize):
            rng = np.random.default_rng([plan.seed, number])
            start = [_drawn(rng, part) for part in start]
        model.load(start)


def _drawn(rng: np.random.Generator, part: Part) -> Part:
    """Return a layer with new weights; any other part as it is."""
    return replace(part, weight=glorot_uniform(rng, *part.weight.shape)) if isinstance(part, Layer) else part


def evaluate(model: Model, data: Dataset, number: int, began: float) -> Round:
    """Return a round that began at ``began``, in seconds of ``time.perf_counter``, as it ends now.

    Raises:
        Diverged: the last step of its training left a value that is not finite, which no loss has told.

    """
    if not all(np.isfinite(array).all() for part in model.parts() for array in arrays(part).values()):
        raise Diverged("training left weights that are not finite; try a lower learning rate")
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
