"""Pruning, and regrowing, within one training run.

Nothing here writes checkpoints: a training run that is to be gone on with needs the optimiser's memory, which
engines keep to themselves. Both runs are as long as one round of ``iterative_prune``.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import numpy as np

from . import report
from .choices import (
    Continue,
    Global,
    Magnitude,
    Polynomial,
    Regrowth,
    RigL,
    Saliency,
    Sparsities,
    Structure,
    Training,
    check_choice,
    check_count,
    check_number,
    sparsities,
)
from .datasets import Dataset
from .engines.parts import check_batches
from .errors import InvalidInput
from .experiment import Plan, Round, Run, batch_order, begin, evaluate, steps_per_epoch, train
from .network import Network, check_dataset


def gradual_prune(
    net: Network,
    data: Dataset,
    *,
    saliency: Saliency = Magnitude(),
    structure: Structure = Global(),
    schedule: Sparsities = Polynomial(0.8, 10),
    every: int | None = None,
    training: Training = Training(),
    seed: int = 0,
    progress: bool | None = None,
) -> Run:
    """Train ``net`` once, and prune it on the way (Zhu & Gupta 2017, arXiv:1710.01878).

    Every ``every`` steps the network is pruned to the next target, and training goes on, the memory of the
    optimiser with it; after the last target, to the end. ``Run.save`` writes the run; there is no ``out``, since
    a training cannot be resumed without the optimiser's memory.

    Args:
        net: the network; it is trained and pruned in place.
        data: what to train on, and to test on before each pruning and at the end.
        saliency: how much a weight matters; criteria that need data get all training samples.
        structure: what competes with what.
        schedule: how much is gone after each pruning; any list of sparsities will do.
        every: training steps before the first pruning, and between two; by default the rounds share the training
            evenly.
        training: how the network is trained.
        seed: of the order of the batches.
        progress: show a progress bar on stderr; by default, where that is a terminal.

    Returns:
        The run. Round 0 is the network before the first pruning, round k just before the next or at the end.

    Raises:
        InvalidInput: an argument cannot be used, or training ends before the schedule. Nothing has changed then.
        Diverged: a training loss, or at the end a weight, is not finite.

    """
    total, samples = _steps(net, data, training), (data.x_train, data.y_train)
    targets = tuple(sparsities(schedule))
    every = max(1, total // (len(targets) + 1)) if every is None else check_count("every", every, 1)
    if len(targets) * every >= total:
        raise InvalidInput(
            f"schedule must end before training does, but its {len(targets)} prunings, one every {every} steps, "
            f"take all of {total} steps"
        )
    run = begin(net, data, Plan(saliency, structure, targets, Continue(), training, seed, every=every))
    pauses = range(every, len(targets) * every + 1, every)
    began = time.perf_counter()
    with report.progress(0, progress) as tick:
        steps = train(net.model, data, training, seed, 0, training.eta, pauses, tick)
        for number, target in enumerate(targets):
            next(steps)
            run.add(evaluate(net.model, data, number, began))
            began = time.perf_counter()
            net.model.prune(saliency, target, structure, samples)
        for _ in steps:  # to the end: there are no more pauses
            pass
    run.add(evaluate(net.model, data, len(targets), began))
    return run


def sparse_train(
    net: Network,
    data: Dataset,
    *,
    method: Regrowth = RigL(),
    every: int = 100,
    stop: float = 0.75,
    training: Training = Training(),
    seed: int = 0,
    progress: bool | None = None,
) -> Round:
    """Train a sparse network at its sparsity, while its smallest weights give their places to others.

    After every ``every`` steps t, before ``stop`` of all T, the share fraction/2·(1 + cos(π·t/(stop·T))) of each
    layer's kept weights is dropped and as many grow (Mocanu et al. 2018, arXiv:1707.04780; Evci et al. 2020,
    arXiv:1911.11134). Gradients are those of the batch that comes next. It takes one training and writes no
    checkpoints.

    Args:
        net: the network, pruned already: ``prune(net, RandomSaliency(), sparsity=0.9, structure=ERK())``, say.
        data: what to train on, and to test on at the end.
        method: what grows.
        every: training steps between two changes of the masks.
        stop: the share of the training, in (0, 1), after which masks stay.
        training: how the network is trained.
        seed: of the order of the batches, and of what is drawn.
        progress: show a progress bar on stderr; by default, where that is a terminal.

    Returns:
        The trained network's measures, as a round 0.

    Raises:
        InvalidInput: an argument cannot be used, nothing is pruned, or nothing would grow before ``stop``.
            Nothing has changed then.
        Diverged: a training loss, or at the end a weight, is not finite.

    """
    total, n = _steps(net, data, training), len(data.y_train)
    check_choice("method", method, Regrowth)
    check_count("every", every, 1)
    check_count("seed", seed, 0)
    check_number("stop", stop, 0, 1, open_low=True)
    end = stop * total
    if net.sparsity == 0:
        raise InvalidInput(
            "net must be sparse, so that weights can grow, but nothing of it is pruned; prune it first"
        )
    if every >= end:
        raise InvalidInput(f"every must be below stop × training steps = {end:g}, or nothing grows, not {every}")
    epoch_steps, began = steps_per_epoch(n, training), time.perf_counter()
    with report.progress(0, progress) as tick:
        pauses = range(every, math.ceil(end), every)
        for step in train(net.model, data, training, seed, 0, training.eta, pauses, tick):
            order, at = batch_order(n, seed, 0, step // epoch_steps), step % epoch_steps * training.batchsize
            batch = order[at : at + training.batchsize]
            fraction = method.fraction / 2 * (1 + math.cos(math.pi * step / end))
            net.model.regrow(_drawing(method, seed, step), fraction, (data.x_train[batch], data.y_train[batch]))
    return evaluate(net.model, data, 0, began)


def _steps(net: Network, data: Dataset, training: Training) -> int:
    """Return how many steps a training takes; InvalidInput unless network, data and training fit each other."""
    check_choice("training", training, Training)
    _, y = check_dataset(net, data)
    if training.epochs:
        check_batches(net.parts, len(y), training.batchsize, "training's")
    return training.epochs * steps_per_epoch(len(y), training)


def _drawing(method: Any, seed: int, step: int) -> Regrowth:
    """Return the method as it is at a step: one that is random draws anew each time."""
    if method.random:
        drawn = np.random.default_rng([seed, method.seed, step]).integers(2**63)
        method = replace(method, seed=int(drawn))
    return method  # type: ignore[no-any-return]
