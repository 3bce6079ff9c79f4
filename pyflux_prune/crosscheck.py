"""The same experiment on both engines, from the same weights over the same batches, and where they part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from .choices import (
    Exponential,
    FineTune,
    Global,
    Layerwise,
    Magnitude,
    Rewind,
    Saliency,
    Sparsities,
    Sparsity,
    Structure,
    Training,
    check_choice,
    sparsities,
)
from .datasets import Dataset
from .engines import Layer, Model, get_engine
from .engines.base import Scores
from .engines.parts import BatchNorm, Bool, Float, Int, Part, arrays, copies, input_shape, prunable
from .experiment import Plan, batch_order, check_fit, restart, train_round
from .network import Network

if TYPE_CHECKING:
    from rich.table import Table

FORWARD, LOSS, GRADIENT, STEPS, WEIGHTS, SCORES, PRUNED, ACCURACY = 1e-5, 1e-5, 1e-4, 1e-4, 1e-4, 1e-6, 1e-6, 0.02
"""Tolerances: relative, but for accuracy, which is absolute; masks must be identical."""

Array = Float | Scores | None

FIRST_STEPS = 100
"""How many training steps of each round are compared one by one; further on, rounding errors grow."""

STEPS_PER_TURN = 10

KINK = 1e-5
"""How near to a kink, relative to the layer's largest value, leaves a sample out of comparing derivatives.

ReLU has one at 0, and max pooling where the two largest of a window are equal. There rounding decides which of
two slopes an engine takes. One such sample in a hundred steps is enough to let weights drift apart by some 1e-3;
without them they stay together to some 1e-6. Of images it is a tenth: there are many places, and the slope at one
of them matters less.
"""

CHUNK = 256
"""How many samples are looked at together for kinks."""

ALIKE = 4e-4
"""How near to its largest value, relative to that, a window of max pooling has no other.

Flux gives the gradient to the first value that is equal to the largest by ``isapprox``: to 3.5e-4.
"""

TIE = 1e-12
"""How near, likewise, counts as at the kink itself: values that are equal but for the rounding of float64.

Such are a neuron without weights, and windows that see the same, such as the margin of an image; the slope is the
same then, whichever an engine takes.
"""


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
    schedule: Sparsities = Exponential(rate=0.2, rounds=3),
    finetune: FineTune = Rewind(),
    training: Training = Training(epochs=3),
    seed: int = 0,
    pretrain: bool = True,
    engines: tuple[str, str] = ("julia", "torch"),
) -> CrossCheck:
    """Run an experiment on both engines and compare it step by step; ``net`` itself is left as it is.

    In each round: forward pass, loss and gradients on the test set; the weights and losses of the first 100
    training steps; accuracy after training; then, from the weights of the first engine, what ``compact`` makes of
    them, scores, masks, and weights after pruning. Gradients and steps leave out the samples that come within
    rounding of a kink, of ReLU or of max pooling, and are left out where there are no others. The masks of
    ``Magnitude()`` are also compared with those of ``torch.nn.utils.prune.l1_unstructured`` and
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
        pretrain: as for ``iterative_prune``.
        engines: the two to compare.

    Raises:
        InvalidInput: an argument cannot be used.
        EngineUnavailable: one of the engines cannot be had here.

    """
    check_choice("net", net, Network)
    plan = Plan(saliency, structure, tuple(sparsities(schedule)), finetune, training, seed, pretrain)
    check_fit(net, data, plan)
    ours, theirs = (get_engine(name).build(net.parts) for name in engines)
    result = CrossCheck()
    origin: list[Part] = []
    for number in range(len(plan.schedule) + 1):

        def compare(quantity: str, value: float, tolerance: float, number: int = number) -> None:
            result.differences.append(Difference(number, quantity, float(value), tolerance))

        if number:
            _compare_pruning(ours, theirs, data, plan, plan.schedule[number - 1], compare)
            restart(ours, plan, origin, number)
            theirs.load(ours.parts())
        _compare_functions(ours, theirs, data, compare)
        start = copies(ours.parts())
        if plan.trains(number):
            _compare_steps(ours, theirs, data, plan, number, compare)
            start = train_round(ours, data, plan, number)
            train_round(theirs, data, plan, number)
        origin = origin if number else start
        accuracies = [m.evaluate(data.x_test, data.y_test)[1] for m in (ours, theirs)]
        compare("accuracy", abs(accuracies[0] - accuracies[1]), ACCURACY)
        theirs.load(ours.parts())
        _compare_compact(ours, theirs, data, compare)
    return result


Compare = Callable[[str, float, float], None]


def _compare_functions(ours: Model, theirs: Model, data: Dataset, compare: Compare) -> None:
    x = data.x_test
    compare("forward", apart([ours.forward(x)], [theirs.forward(x)]), FORWARD)
    away = off_kinks(ours, x)
    if not away.any():
        return
    x, y = x[away], data.y_test[away]
    (loss, gradients), (their_loss, their_gradients) = (
        ours.loss_and_gradients(x, y),
        theirs.loss_and_gradients(x, y),
    )
    compare("loss", abs(loss - their_loss) / abs(their_loss), LOSS)
    flat, their_flat = ([array for pair in g for array in pair] for g in (gradients, their_gradients))
    compare("gradients", apart(flat, their_flat), GRADIENT)


def _compare_compact(ours: Model, theirs: Model, data: Dataset, compare: Compare) -> None:
    """Compare what ``compact`` makes of the same network with that network, and in shape with each other."""
    small = [model.compact() for model in (ours, theirs)]
    shapes, their_shapes = ([la.weight.shape for la in model.layers()] for model in small)
    outputs = [model.forward(data.x_test) for model in small]
    distance = apart(outputs, [ours.forward(data.x_test)] * 2) if shapes == their_shapes else np.inf
    compare("compact network", distance, FORWARD)


def _compare_steps(ours: Model, theirs: Model, data: Dataset, plan: Plan, number: int, compare: Compare) -> None:
    """Take the first training steps on both engines, one by one, and go back to where they began.

    A step is taken with the samples of its batch that are clear of kinks; without such, it is left out.
    """
    began, steps = copies(ours.parts()), islice(_steps(len(data.y_train), plan, number), FIRST_STEPS)
    for model in (ours, theirs):
        model.start(plan.training.optimiser)
    weights: list[float] = []
    losses: list[float] = []
    # In turns of several steps: the idle threads of one engine slow the other down for a while.
    while turn := list(islice(steps, STEPS_PER_TURN)):
        taken = []
        for eta, batch in turn:
            part = _smooth(ours, data, batch)
            if len(part):
                taken.append((eta, part, *_step(ours, data, eta, part)))
        for eta, part, loss, ours_then in taken:
            their_loss, theirs_then = _step(theirs, data, eta, part)
            losses.append(abs(loss - their_loss) / abs(their_loss))
            weights.append(apart(ours_then, theirs_then))
    if weights:
        compare("loss of each step", float(np.max(losses)), STEPS)
        compare("weights after each step", float(np.max(weights)), WEIGHTS)
    for model in (ours, theirs):
        model.load(began)


def off_kinks(model: Model, x: Float) -> Bool:
    """Return which samples, (samples,), come near no kink."""
    parts, chunks = model.parts(), range(0, len(x), CHUNK)
    return np.concatenate([_away(parts, x[at : at + CHUNK], training=False) for at in chunks])


def _smooth(model: Model, data: Dataset, batch: Int) -> Int:
    """Return the samples of a batch that come near no kink in a training step with these alone.

    With batch normalisation, to leave samples out moves the others: they are looked at again, until all are clear
    of kinks or fewer than two are left, which are none.
    """
    parts = model.parts()
    if not any(isinstance(part, BatchNorm) for part in parts):
        return batch[_away(parts, data.x_train[batch], training=False)]
    while len(batch) > 1 and not (away := _away(parts, data.x_train[batch], training=True)).all():
        batch = batch[away]
    return batch if len(batch) > 1 else batch[:0]


def _away(parts: Sequence[Part], x: Float, *, training: bool) -> Bool:
    """Return which samples come near no kink, as torch computes in float64.

    In ``training``, batch normalisation uses the statistics of these samples.
    """
    import torch
    from torch import nn

    from .engines.torch import sequential

    away = torch.ones(len(x), dtype=torch.bool)
    with torch.no_grad():
        values = torch.tensor(x, dtype=torch.float64).reshape(len(x), *input_shape(parts))
        for module in sequential(parts).double().train(training):
            if isinstance(module, nn.ReLU | nn.MaxPool2d):
                largest = values.abs().max()
                gaps, near = values.abs(), KINK * largest * (0.1 if values.ndim == 4 else 1)
                if isinstance(module, nn.MaxPool2d):
                    windows = _windows(module, values)
                    first = windows.amax(-1, keepdim=True)
                    gaps, near = first - windows, torch.maximum(near, ALIKE * first.abs())
                away &= ~((gaps > TIE * largest) & (gaps < near)).flatten(1).any(1)
            values = module(values)
    return away.numpy()


def _windows(pool: Any, values: Any) -> Any:
    """Return the values in each window of a max pooling, (samples, channels, height, width, values)."""
    from torch.nn.functional import pad

    (height, width), (down, right), (above, left) = pool.kernel_size, pool.stride, pool.padding
    padded = pad(values, (left, left, above, above), value=-np.inf)
    return padded.unfold(2, height, down).unfold(3, width, right).flatten(-2)


def _steps(n: int, plan: Plan, number: int) -> Iterator[tuple[float, Int]]:
    """Yield the learning rate and the batch of each training step of a round."""
    size = plan.training.batchsize
    for epoch in range(plan.training.epochs):
        order = batch_order(n, plan.seed, number, epoch)
        for at in range(0, n, size):
            yield plan.eta(number, epoch), order[at : at + size]


def _step(model: Model, data: Dataset, eta: float, part: Int) -> tuple[float, list[Array]]:
    """Take one training step; return the loss before it, and what it trains after it."""
    model.adjust(eta)
    loss = float(model.train(data.x_train, data.y_train, part, len(part))[0])
    return loss, _trained(copies(model.parts()))


def _trained(parts: Sequence[Part]) -> list[Array]:
    """Return what training changes, but for a bias that batch normalisation takes away again, and its mean.

    The gradient of such a bias is 0 but for rounding, which optimisers like Adam make steps of; the stored mean
    follows it, so that they cancel.
    """
    found: list[Array] = []
    idle = False
    for part, after in zip_longest(parts, parts[1:]):
        left_out = {"mask"} | ({"mean"} if idle else set())
        idle = isinstance(part, Layer) and part.activation == "identity" and isinstance(after, BatchNorm)
        left_out |= {"bias"} if idle else set()
        found += [array for name, array in arrays(part).items() if name not in left_out]
    return found


def _compare_pruning(
    ours: Model, theirs: Model, data: Dataset, plan: Plan, sparsity: Sparsity, compare: Compare
) -> None:
    before, samples = prunable(copies(ours.parts())), (data.x_train, data.y_train)
    models = (ours,) if plan.saliency.random else (ours, theirs)
    scores = [_that_count(m.scores(plan.saliency, samples), before) for m in models]
    for model in models:
        model.prune(plan.saliency, sparsity, plan.structure, samples)
    masks, *their_masks = [[la.mask for la in m.layers()] for m in models]
    if not plan.saliency.random:
        compare("scores", apart(*scores), SCORES)
        compare("masks", _entries_apart(masks, *their_masks), 0)
        compare("weights after pruning", apart(*(_values(m.parts()) for m in models)), PRUNED)
    if plan.saliency == Magnitude() and plan.structure in (Global(), Layerwise()):
        compare(
            "masks of torch.nn.utils.prune",
            _entries_apart(masks, torch_masks(before, sparsity, plan.structure)),
            0,
        )


def _values(parts: Sequence[Part]) -> list[Array]:
    """Return all arrays but masks."""
    return [array for part in parts for name, array in arrays(part).items() if name != "mask"]


def _that_count(scores: Sequence[Scores], layers: Sequence[Layer]) -> list[Scores]:
    """Return the scores of neurons, or those of kept weights."""
    return [s if s.ndim == 1 else s[la.mask] for s, la in zip(scores, layers, strict=True)]


def torch_masks(layers: Sequence[Layer], sparsity: Sparsity, structure: Structure) -> list[Bool]:
    """Return the masks that PyTorch's own magnitude pruning gives these layers at ``sparsity``."""
    import torch.nn.utils.prune

    from .engines.torch import mask_weight, prunable_modules, sequential

    prune: Any = torch.nn.utils.prune
    modules: list[Any] = list(prunable_modules(sequential(layers)))
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
    """Return how far arrays are apart: the largest ‖a − b‖ ÷ ‖b‖, in the Euclidean norm, of all pairs.

    Infinities must be the same in both, and do not count then.
    """
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x is not None and y is not None:
            one, other = x.astype(np.float64), y.astype(np.float64)
            difference = np.subtract(one, other, where=one != other, out=np.zeros_like(one))
            distance, size = np.linalg.norm(difference), np.linalg.norm(other[np.isfinite(other)])
            worst = _worst(worst, float(distance / size if size else distance))
    return worst
