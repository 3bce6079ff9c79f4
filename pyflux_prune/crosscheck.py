"""The same experiment on both engines, from the same weights over the same batches, and where they part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from .choices import (
    Exponential,
    FineTune,
    Global,
    Magnitude,
    RandomSaliency,
    Rewind,
    Saliency,
    Schedule,
    Sparsity,
    Structure,
    Training,
    check_choice,
    sparsities,
)
from .datasets import Dataset
from .engines import Layer, Model, get_engine
from .engines.base import Bool, Float, Int
from .experiment import Plan, batch_order, check_fit, copies, restart, train_round
from .network import Network

if TYPE_CHECKING:
    from rich.table import Table

FORWARD, LOSS, GRADIENT, STEPS, WEIGHTS, SCORES, ACCURACY = 1e-5, 1e-5, 1e-4, 1e-4, 1e-4, 1e-6, 0.02
"""Tolerances: relative, but for accuracy, which is absolute; masks must be identical."""

Array = Float | None

FIRST_STEPS = 100
"""How many training steps of each round are compared one by one; further on, rounding errors grow."""

STEPS_PER_TURN = 10


@dataclass(frozen=True)
class Difference:
    """How far the engines are apart in one quantity of one round.

    Attributes:
        round: 0 is the dense network.
        quantity: what is compared.
        value: the largest difference seen; relative, a share for accuracy, a number of entries for masks.
        tolerance: the largest that passes.

    """

    round: int
    quantity: str
    value: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the difference is within tolerance; never for NaN."""
        return self.value <= self.tolerance


@dataclass
class CrossCheck:
    """The differences between the engines."""

    differences: list[Difference] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every difference is within its tolerance."""
        return all(d.ok for d in self.differences)

    def table(self) -> Table:
        """Return the worst difference of each quantity in each round as a table to print."""
        from rich.table import Table

        shown = Table(title="Julia against PyTorch", title_justify="left")
        for heading in ("round", "quantity", "difference", "tolerance", "within"):
            shown.add_column(heading, justify="left" if heading == "quantity" else "right")
        for d in self.differences:
            shown.add_row(str(d.round), d.quantity, f"{d.value:.2g}", f"{d.tolerance:g}", "yes" if d.ok else "NO")
        return shown


def crosscheck(
    net: Network,
    data: Dataset,
    *,
    saliency: Saliency = Magnitude(),
    structure: Structure = Global(),
    schedule: Schedule = Exponential(rate=0.2, rounds=3),
    finetune: FineTune = Rewind(),
    training: Training = Training(epochs=3),
    seed: int = 0,
    engines: tuple[str, str] = ("julia", "torch"),
) -> CrossCheck:
    """Run an experiment on both engines and compare it step by step; ``net`` itself is left as it is.

    In each round: forward pass, loss and gradients on the test set; the weights and losses of the first 100
    training steps; accuracy after training; then, from the weights of the first engine, scores and masks. The
    masks of ``Magnitude`` are also compared with those of ``torch.nn.utils.prune.l1_unstructured`` and
    ``global_unstructured``. A saliency that is random is not compared: both engines take the masks of the first.

    Args:
        net: the network to begin with.
        data: what to train and test on.
        saliency: as for ``iterative_prune``.
        structure: as for ``iterative_prune``.
        schedule: as for ``iterative_prune``.
        finetune: as for ``iterative_prune``.
        training: as for ``iterative_prune``.
        seed: as for ``iterative_prune``.
        engines: the two to compare.

    Raises:
        InvalidInput: an argument cannot be used.
        EngineUnavailable: one of the engines cannot be had here.

    """
    check_choice("net", net, Network)
    check_choice("data", data, Dataset)
    plan = Plan(saliency, structure, tuple(sparsities(schedule)), finetune, training, seed)
    check_fit(net, data, plan)
    ours, theirs = (get_engine(name).build(net.layers) for name in engines)
    result = CrossCheck()
    origin: list[Layer] = []
    for number in range(len(plan.schedule) + 1):

        def compare(quantity: str, value: float, tolerance: float, number: int = number) -> None:
            result.differences.append(Difference(number, quantity, float(value), tolerance))

        if number:
            _compare_pruning(ours, theirs, plan, plan.schedule[number - 1], compare)
            restart(ours, plan, origin, number)
            theirs.load(ours.layers())
        _compare_functions(ours, theirs, data, compare)
        if number == 0 or plan.finetune is not None:
            _compare_steps(ours, theirs, data, plan, number, compare)
            start = train_round(ours, data, plan, number)
            train_round(theirs, data, plan, number)
            origin = start if number == 0 else origin
        accuracies = [m.evaluate(data.x_test, data.y_test)[1] for m in (ours, theirs)]
        compare("accuracy", abs(accuracies[0] - accuracies[1]), ACCURACY)
        theirs.load(ours.layers())
    return result


Compare = Callable[[str, float, float], None]


def _compare_functions(ours: Model, theirs: Model, data: Dataset, compare: Compare) -> None:
    x, y = data.x_test, data.y_test
    compare("forward", apart([ours.forward(x)], [theirs.forward(x)]), FORWARD)
    (loss, gradients), (their_loss, their_gradients) = (
        ours.loss_and_gradients(x, y),
        theirs.loss_and_gradients(x, y),
    )
    compare("loss", abs(loss - their_loss) / abs(their_loss), LOSS)
    flat, their_flat = ([array for pair in g for array in pair] for g in (gradients, their_gradients))
    compare("gradients", apart(flat, their_flat), GRADIENT)


def _compare_steps(ours: Model, theirs: Model, data: Dataset, plan: Plan, number: int, compare: Compare) -> None:
    """Take the first training steps on both engines, one by one, and go back to where they began."""
    began, size = copies(ours.layers()), plan.training.batchsize
    orders = (batch_order(len(data.y_train), plan.seed, number, epoch) for epoch in range(plan.training.epochs))
    batches = (order[at : at + size] for order in orders for at in range(0, len(order), size))
    for model in (ours, theirs):
        model.start(plan.training.optimiser)
    weights, losses = 0.0, 0.0
    first = islice(batches, FIRST_STEPS)
    # In turns of several steps: the idle threads of one engine slow the other down for a while.
    while turn := list(islice(first, STEPS_PER_TURN)):
        before = [_step(ours, data, part) for part in turn]
        for part, (loss, arrays) in zip(turn, before, strict=True):
            their_loss, their_arrays = _step(theirs, data, part)
            losses = _worst(losses, abs(loss - their_loss) / abs(their_loss))
            weights = _worst(weights, apart(arrays, their_arrays))
    compare("loss of each step", losses, STEPS)
    compare("weights after each step", weights, WEIGHTS)
    for model in (ours, theirs):
        model.load(began)


def _step(model: Model, data: Dataset, part: Int) -> tuple[float, list[Array]]:
    """Take one training step; return the loss before it, and the weights and biases after it."""
    loss = float(model.train(data.x_train, data.y_train, part, len(part))[0])
    return loss, [array for la in copies(model.layers()) for array in (la.weight, la.bias)]


def _compare_pruning(ours: Model, theirs: Model, plan: Plan, sparsity: Sparsity, compare: Compare) -> None:
    before = copies(ours.layers())
    random = isinstance(plan.saliency, RandomSaliency)
    if not random:
        compare("scores", apart(ours.scores(plan.saliency), theirs.scores(plan.saliency)), SCORES)
        theirs.prune(plan.saliency, sparsity, plan.structure)
    ours.prune(plan.saliency, sparsity, plan.structure)
    masks = [la.mask for la in ours.layers()]
    if not random:
        compare("masks", _entries_apart(masks, [la.mask for la in theirs.layers()]), 0)
    if isinstance(plan.saliency, Magnitude):
        compare(
            "masks of torch.nn.utils.prune",
            _entries_apart(masks, torch_masks(before, sparsity, plan.structure)),
            0,
        )


def torch_masks(layers: Sequence[Layer], sparsity: Sparsity, structure: Structure) -> list[Bool]:
    """Return the masks that PyTorch's own magnitude pruning gives these layers at ``sparsity``."""
    import torch.nn.utils.prune

    from .engines.torch import linears, mask_weight, sequential

    prune: Any = torch.nn.utils.prune
    modules: list[Any] = list(linears(sequential(layers)))
    for module, layer in zip(modules, layers, strict=True):
        mask_weight(module, layer.mask)
    groups = [modules] if isinstance(structure, Global) else [[m] for m in modules]
    targets = sparsity if isinstance(sparsity, tuple) else (sparsity,) * len(groups)
    for group, target in zip(groups, targets, strict=True):
        masks = [m.weight_mask for m in group]
        amount = round(target * sum(m.numel() for m in masks)) - sum(int((m == 0).sum()) for m in masks)
        if len(group) == 1:
            prune.l1_unstructured(group[0], "weight", amount)
        else:
            prune.global_unstructured([(m, "weight") for m in group], prune.L1Unstructured, amount=amount)
    return [m.weight_mask.numpy().astype(bool) for m in modules]


def _entries_apart(a: Sequence[Bool], b: Sequence[Bool]) -> int:
    return sum(int((x != y).sum()) for x, y in zip(a, b, strict=True))


def _worst(a: float, b: float) -> float:
    """Return the larger; NaN if either is."""
    return float(np.maximum(a, b))


def apart(a: Sequence[Array], b: Sequence[Array]) -> float:
    """Return how far arrays are apart: the largest ‖a − b‖ ÷ ‖b‖, in the Euclidean norm, of all pairs."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x is not None and y is not None:
            distance, size = float(np.linalg.norm(x.astype(np.float64) - y)), float(np.linalg.norm(y))
            worst = _worst(worst, distance / size if size else distance)
    return worst
