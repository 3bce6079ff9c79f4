"""Convolutions, batch normalisation and pooling on the reference engine, against plain modules of torch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune
from torch_networks import (
    IMAGE,
    all_arrays,
    assert_close,
    assert_pruned_are_zero,
    assert_same,
    build,
    image_module,
    images,
    make_images,
    make_layers,
    parts_of,
    randomised,
)

from pyflux_prune.choices import (
    ERK,
    OBD,
    OBS,
    SET,
    SNIP,
    Activation,
    Adam,
    AdamW,
    Descent,
    EdgePopup,
    Global,
    GraSP,
    Layerwise,
    Magnitude,
    Momentum,
    Movement,
    Nesterov,
    Neurons,
    NofM,
    Optimiser,
    PerOutput,
    RandomSaliency,
    Redundancy,
    Regrowth,
    RigL,
    RMSProp,
    Saliency,
    Structure,
    SynFlow,
    Taylor,
    Threshold,
    Training,
    Wanda,
)
from pyflux_prune.engines.parts import BatchNorm, ConvLayer, Flatten, Input, Layer, Part, Pool, copies, shapes
from pyflux_prune.engines.torch import TorchModel, prunable_modules, sequential
from pyflux_prune.errors import InvalidInput

pytestmark = pytest.mark.filterwarnings(
    "ignore::pyflux_prune.errors.LayerCollapse",
    "ignore:`torch.jit.script` is deprecated",  # by torch.func.hessian
)

CRITERIA: list[Saliency] = [
    Magnitude(),
    Magnitude(scaled=True),
    Threshold(),
    Taylor(batchsize=7),
    SNIP(per_class=4),
    GraSP(per_class=4),
    SynFlow(iterations=3),
    OBD(exact=True),
    OBS(damping=0.1, iterations=2),
    Wanda(),
    Movement(Training(epochs=1, batchsize=16)),
    EdgePopup(training=Training(epochs=1, batchsize=16)),
    RandomSaliency(),
]
OF_NEURONS: list[Saliency] = [Activation(), Activation(zeros=True)]
FOR_PERCEPTRONS: list[Saliency] = [OBD(), OBS(full=True), Redundancy(), Redundancy(activations=True)]
STRUCTURES: list[Structure] = [Global(), Layerwise(), PerOutput(), ERK(), NofM(1, 2), Neurons(min_kept=1)]

Network = tuple[nn.Sequential, TorchModel]


def both(density: float = 1.0) -> Network:
    """The same network as a module and on the engine."""
    module = image_module(density=density)
    return module, build(parts_of(module))


def plain(module: nn.Sequential) -> nn.Sequential:
    """A float64 copy whose weights are parameters, masked for good."""
    for part in layers_of(module):
        part.weight = part.weight.detach()  # only so can it be copied
    double = copy.deepcopy(module).double()
    for part in layers_of(double):
        prune.remove(part, "weight")
    return double


def layers_of(module: nn.Sequential) -> list[Any]:
    return [part for part in module if isinstance(part, nn.Linear | nn.Conv2d)]


def weights_of(module: nn.Sequential) -> list[Tensor]:
    return [part.weight for part in layers_of(module)]


def masks_of(model: TorchModel) -> list[Tensor]:
    return [torch.from_numpy(layer.mask) for layer in model.layers()]


def gradients(module: nn.Sequential, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(cross_entropy(module(x), y), weights_of(module))


def inputs_of(module: nn.Sequential, x: Tensor) -> list[Tensor]:
    """What goes into each prunable module."""
    found: list[Tensor] = []
    hooks = [part.register_forward_pre_hook(lambda _, args: found.append(args[0])) for part in layers_of(module)]
    with torch.no_grad():
        module(x)
    for hook in hooks:
        hook.remove()
    return found


def rows_of(part: Any, x: Tensor) -> Tensor:
    """What each output of a module is the product of its weights with, (samples·places, weights)."""
    if isinstance(part, nn.Linear):
        return x
    unfold = nn.Unfold(part.kernel_size, part.dilation, part.padding, part.stride)
    return unfold(x).movedim(1, 2).flatten(0, 1)


# --- networks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [1.0, 0.4])
def test_outputs_loss_and_gradients_are_those_of_the_module(density: float) -> None:
    module, model = both(density)
    x, y = make_images(600)  # more than are computed at a time
    outputs = module(images(x))
    assert_close(model.forward(x), outputs.detach(), rtol=1e-4, atol=1e-5)
    expected = cross_entropy(outputs, torch.from_numpy(y))
    loss, accuracy = model.evaluate(x, y)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert accuracy == pytest.approx((outputs.argmax(1).numpy() == y).mean())
    loss, found = model.loss_and_gradients(x, y)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    parameters = [p for part in layers_of(module) for p in (part.weight_orig, part.bias) if p is not None]
    flat = [array for pair in found for array in pair if array is not None]
    for mine, gradient in zip(flat, torch.autograd.grad(expected, parameters), strict=True):
        assert_close(mine, gradient, rtol=1e-3, atol=1e-6)


def test_the_sequential_is_the_module_that_parts_are_read_from() -> None:
    module = image_module()
    state = torch.get_rng_state()
    made = sequential(parts_of(module))
    assert torch.equal(torch.get_rng_state(), state)
    for part in layers_of(module):
        prune.remove(part, "weight")
    assert repr(made) == repr(module)
    expected = {key: value for key, value in module.state_dict().items() if "num_batches" not in key}
    for key, value in expected.items():
        assert torch.equal(made.state_dict()[key], value), key
    assert prunable_modules(made) == layers_of(made)


def test_a_network_may_begin_with_any_part_and_end_with_any() -> None:
    module = randomised(nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)))
    x, _ = make_images()
    parts = parts_of(module)
    for end in range(2, len(parts) + 1):
        expected = module[: 2 * end - 2 - (end > 2)](images(x)).flatten(1)
        assert_close(build(parts[:end]).forward(x), expected.detach(), rtol=1e-4, atol=1e-5)


def test_parts_are_views_and_all_arrays_are_loaded_in_place() -> None:
    _, model = both(0.5)
    _, other = (None, build(parts_of(image_module(seed=1, density=0.5))))
    views, given = model.parts(), copies(other.parts())
    model.load(given)
    assert_same(all_arrays(model), all_arrays(other))
    x, _ = make_images()
    assert_same([model.forward(x)], [other.forward(x)])
    norms = [part for part in views if isinstance(part, BatchNorm)]
    for norm in norms:
        norm.mean[:] += 1
    assert not np.allclose(model.forward(x), other.forward(x))
    assert_same(all_arrays(build(given)), all_arrays(other))  # none of them is shared
    assert [type(part) for part in views] == [type(part) for part in given]


def test_weights_may_be_ordered_by_columns() -> None:
    parts = parts_of(image_module())
    ordered = [
        part
        if not isinstance(part, Layer)
        else type(part)(**{**vars(part), "weight": np.asfortranarray(part.weight)})
        for part in parts
    ]
    assert_same(all_arrays(build(ordered)), all_arrays(build(parts)))


# --- training --------------------------------------------------------------------------------------------

RULES: list[tuple[Optimiser, Callable[[Any], torch.optim.Optimizer]]] = [
    (Descent(0.1), lambda p: torch.optim.SGD(p, 0.1)),
    (Momentum(0.1, 0.9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
    (Nesterov(0.1, 0.9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True)),
    (RMSProp(0.01), lambda p: torch.optim.RMSprop(p, 0.01, alpha=0.9)),
    (Adam(0.01), lambda p: torch.optim.Adam(p, 0.01)),
    (AdamW(0.01), lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.01)),
]


@pytest.mark.parametrize(("rule", "make"), RULES, ids=lambda rule: type(rule).__name__)
def test_training_is_that_of_torch_and_moves_the_statistics(rule: Any, make: Callable[[Any], Any]) -> None:
    module, model = both(0.5)
    x, y = make_images(50)
    order = np.random.default_rng(0).permutation(50)
    model.start(rule)
    losses = model.train(x, y, order, 16)
    optimiser, expected = make(module.parameters()), []
    module.train()
    for batch in torch.split(torch.from_numpy(order), 16):
        optimiser.zero_grad()
        loss = cross_entropy(module(images(x)[batch]), torch.from_numpy(y)[batch])
        loss.backward()
        optimiser.step()
        expected.append(loss.item())
    assert_close(losses, expected, rtol=1e-4)
    for mine, theirs in zip(model.parts(), parts_of(module), strict=True):
        for name, array in vars(theirs).items():
            if isinstance(array, np.ndarray):
                assert_close(getattr(mine, name), array, rtol=1e-3, atol=1e-5)
    assert_pruned_are_zero(model)
    assert not model.module.training


def test_two_batches_are_not_two_trainings() -> None:
    """Statistics go on from where they are, and stay there between trainings."""
    x, y = make_images(32)
    once, twice = both()[1], both()[1]
    once.start(Momentum(0.1))
    once.train(x, y, np.arange(32), 16)
    twice.start(Momentum(0.1))
    for half in np.split(np.arange(32), 2):
        twice.train(x, y, half, 16)
        twice.forward(x)
        twice.scores(Movement(), (x, y))
    assert_same(all_arrays(once), all_arrays(twice))


@pytest.mark.parametrize("criterion", CRITERIA + OF_NEURONS, ids=str)
def test_nothing_but_training_and_pruning_changes_anything(criterion: Saliency) -> None:
    _, model = both(0.6)
    data, before = make_images(), all_arrays(model)
    model.forward(data[0])
    model.evaluate(*data)
    model.loss_and_gradients(*data)
    model.compact()
    scores = model.scores(criterion, data)
    assert_same(all_arrays(model), before)
    assert_same(model.scores(criterion, data), scores)
    expected = [s[:1] if criterion.of_neurons else s for s in (layer.weight.shape for layer in model.layers())]
    assert [s.shape for s in scores] == expected
    statistics = [copies([part])[0] for part in model.parts() if isinstance(part, BatchNorm)]
    model.prune(criterion, 0.6, Neurons() if criterion.of_neurons else Global(), data)
    after = [part for part in model.parts() if isinstance(part, BatchNorm)]
    for one, other in zip(statistics, after, strict=True):
        assert_same(
            [one.weight, one.bias, one.mean, one.variance], [other.weight, other.bias, other.mean, other.variance]
        )


@pytest.mark.parametrize(("samples", "batchsize"), [(17, 16), (4, 1), (1, 5)])
def test_a_batch_of_one_has_nothing_to_normalise_with(samples: int, batchsize: int) -> None:
    _, model = both()
    x, y = make_images(samples)
    before = all_arrays(model)
    with pytest.raises(InvalidInput, match=r"batch of one of .* samples, but layer 9, "):
        model.scores(Movement(Training(epochs=1, batchsize=batchsize)), (x, y))
    assert_same(all_arrays(model), before)


def test_places_of_one_image_normalise_each_other() -> None:
    module = randomised(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 3)))
    model = build(parts_of(module))
    model.start(Descent(0.1))
    assert np.isfinite(model.train(*make_images(5), np.arange(5), 2)).all()


# --- scores ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("squared", [True, False])
def test_taylor_is_the_effect_of_deletion_to_first_order(squared: bool) -> None:
    """Each weight is shrunk a little, and each batch's loss told."""
    module, model = both(0.5)
    x, y = make_images(20)
    scores = model.scores(Taylor(squared=squared, batchsize=8), (x, y))
    net, shrunk = plain(module), 1e-4
    batches = list(zip(images(x).double().split(8), torch.from_numpy(y).split(8), strict=True))
    rng = np.random.default_rng(0)
    for weight, score in zip(weights_of(net), scores, strict=True):
        for place in rng.choice(score.size, 12, replace=False):
            slopes = []
            for images_, labels in batches:
                losses = []
                for change in (1 - shrunk, 1 + shrunk):
                    old = weight.data.view(-1)[place].item()
                    weight.data.view(-1)[place] *= change
                    with torch.no_grad():
                        losses.append(cross_entropy(net(images_), labels).item())
                    weight.data.view(-1)[place] = old
                slopes.append((losses[1] - losses[0]) / (2 * shrunk))
            expected = np.mean(np.square(slopes) if squared else np.abs(slopes))
            assert score.flat[place] == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_snip_is_the_gradient_times_the_weight_of_a_balanced_batch() -> None:
    module, model = both(0.5)
    x, y = make_images()
    chosen = np.concatenate([np.flatnonzero(y == label)[:4] for label in range(3)])
    net = plain(module)
    found = gradients(net, images(x[chosen]).double(), torch.from_numpy(y[chosen]))
    for score, weight, gradient in zip(
        model.scores(SNIP(per_class=4), (x, y)), weights_of(net), found, strict=True
    ):
        assert_close(score, (gradient * weight).abs().detach(), rtol=1e-9, atol=1e-15)


def hessian(
    net: nn.Sequential, masks: list[Tensor], x: Tensor, y: Tensor, temperature: float
) -> tuple[Tensor, ...]:
    """The Hessian of the loss in all weights, the gradient and the weights, as one matrix and two vectors."""
    named = {name: p.detach() for name, p in net.named_parameters()}
    names = [name for name, p in net.named_parameters() if any(p is weight for weight in weights_of(net))]
    sizes = [named[name].numel() for name in names]

    def loss(flat: Tensor) -> Tensor:
        parts = zip(names, masks, flat.split(sizes), strict=True)
        weights = {name: part.view(mask.shape) * mask for name, mask, part in parts}
        outputs = torch.func.functional_call(net, {**named, **weights}, (x,))
        return cross_entropy(outputs / temperature, y)

    flat = torch.cat([named[name].flatten() for name in names])
    return torch.func.hessian(loss)(flat), torch.func.grad(loss)(flat), flat


def test_grasp_and_exact_obd_are_made_of_the_hessian() -> None:
    module, model = both(0.6)
    x, y = make_images(12)
    net, masks = plain(module), masks_of(model)
    at = [place for label in range(3) for place in np.flatnonzero(y == label)]
    for temperature in (1.0, 3.0):
        h, g, w = hessian(net, masks, images(x[at]).double(), torch.from_numpy(y[at]), temperature)
        scores = model.scores(GraSP(per_class=4, temperature=temperature), (x, y))
        assert_close(np.concatenate([s.ravel() for s in scores]), w * (h @ g), rtol=1e-7, atol=1e-14)
        if temperature == 1:
            scores = model.scores(OBD(exact=True), (x, y))
            assert_close(np.concatenate([s.ravel() for s in scores]), h.diag() * w**2 / 2, rtol=1e-7, atol=1e-14)


def test_exact_obd_counts_the_parameters_of_batch_normalisation() -> None:
    rng = np.random.default_rng(0)
    norm = BatchNorm("0", *(np.ones(100, np.float32) for _ in range(4)))
    weight = rng.normal(size=(3, 100 * 66)).astype(np.float32)
    parts = [Input((100, 6, 11)), norm, Flatten("1"), Layer("2", weight, weight != 0, None, "identity")]
    x, y = make_images(3, (100, 6, 11))
    build(parts[:1] + parts[2:]).scores(OBD(exact=True), (x, y))
    with pytest.raises(InvalidInput, match="takes at most 20,000 parameters, and the network has 20,003"):
        build([*parts[:-1], Layer("2", weight, weight != 0, np.zeros(3, np.float32), "identity")]).scores(
            OBD(exact=True), (x, y)
        )


def test_synflow_is_the_flow_through_absolute_weights_and_stored_statistics() -> None:
    module, model = both(0.7)
    net = plain(module)
    for part in layers_of(net):
        part.weight.data.abs_()
        part.bias = None
    net[5] = nn.Identity()  # the activation of a layer; those of batch normalisation stay
    flow = net(torch.ones(1, *IMAGE, dtype=torch.float64)).sum()
    weights = weights_of(net)
    for score, weight, g in zip(model.scores(SynFlow()), weights, torch.autograd.grad(flow, weights), strict=True):
        assert_close(score, (weight * g).detach(), rtol=1e-9, atol=1e-15)


def test_wanda_is_the_weight_times_the_norm_of_its_patches() -> None:
    module, model = both(0.7)
    x, y = make_images(200)
    net = plain(module)
    scores = model.scores(Wanda(), (x, y))
    for score, part, inputs in zip(scores, layers_of(net), inputs_of(net, images(x).double()), strict=True):
        rows = rows_of(part, inputs)
        norms = (len(x) * rows.square().mean(0)).sqrt()
        assert_close(score, (part.weight.flatten(1).abs() * norms).view(score.shape).detach(), rtol=1e-9)


@pytest.mark.parametrize("zeros", [False, True])
def test_activation_is_a_mean_over_samples_and_places(zeros: bool) -> None:
    module = randomised(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3)
        )
    )
    x, y = make_images(200)
    first = plain(module)[:2](images(x).double())
    second = plain(module)[:5](images(x).double())
    last = plain(module)(images(x).double())
    scores = build(parts_of(module)).scores(Activation(zeros=zeros), (x, y))
    for score, a in zip(scores, (first.movedim(1, 3).flatten(0, 2), second, last), strict=True):
        assert_close(score, ((a != 0).double() if zeros else a.abs()).mean(0).detach(), rtol=1e-9)


def without_pooling(density: float) -> Network:
    """Whose inputs of layers are not linearly dependent."""
    torch.manual_seed(0)
    module = randomised(
        nn.Sequential(
            nn.Conv2d(2, 4, (3, 2), stride=2, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 3, 2, padding=(1, 0), dilation=(1, 2)),
            nn.Flatten(),
            nn.Linear(24, 3),
        ),
        density,
    )
    return module, build(parts_of(module))


def test_obs_scores_the_error_of_the_best_filter_without_the_weight() -> None:
    """Brute force: each weight is deleted, and the others of its filter fitted anew by least squares."""
    module, model = without_pooling(0.7)
    x, y = make_images(150)
    net, masks = plain(module), masks_of(model)
    scores = model.scores(OBS(damping=0), (x, y))
    layers = zip(layers_of(net), masks, scores, inputs_of(net, images(x).double()), strict=True)
    for part, mask, score, inputs in layers:
        rows, weight = rows_of(part, inputs), part.weight.detach().flatten(1)
        for output, q in mask.flatten(1).nonzero()[::5].tolist():
            kept = mask.flatten(1)[output].clone()
            kept[q] = False
            gap = rows[:, q] * weight[output, q]
            fit = torch.linalg.lstsq(rows[:, kept], gap[:, None]).solution[:, 0]
            error = (gap - rows[:, kept] @ fit).square().mean() / 2
            assert score.reshape(len(score), -1)[output, q] == pytest.approx(error.item(), rel=1e-6)


@pytest.mark.parametrize("structure", [Layerwise(), Neurons()], ids=str)
def test_survivors_of_obs_are_the_least_squares_solution(structure: Structure) -> None:
    module, model = without_pooling(0.8)
    x, y = make_images(150)
    net = plain(module)
    before = masks_of(build(parts_of(module)))
    model.prune(OBS(damping=0, iterations=1), 0.4, structure, (x, y))
    layers = zip(layers_of(net), before, model.layers(), inputs_of(net, images(x).double()), strict=True)
    for part, was, layer, inputs in layers:
        rows, old = rows_of(part, inputs), part.weight.detach().flatten(1)
        for output, kept in enumerate(torch.from_numpy(layer.mask).flatten(1)):
            if kept.any() and not torch.equal(kept, was.flatten(1)[output]):
                target = rows @ old[output]
                fit = torch.linalg.lstsq(rows[:, kept], target[:, None]).solution[:, 0]
                assert_close(layer.weight.reshape(len(old), -1)[output][kept.numpy()], fit, rtol=1e-4, atol=1e-5)


def test_movement_is_a_fine_tuning_with_the_statistics_of_batches() -> None:
    module, model = both(0.6)
    x, y = make_images(40)
    training = Training(epochs=2, batchsize=16, optimiser=Momentum(0.1))
    net, masks = plain(module).train(), masks_of(model)
    expected = [torch.zeros_like(weight) for weight in weights_of(net)]
    optimiser = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        for batch, labels in zip(images(x).double().split(16), torch.from_numpy(y).split(16), strict=True):
            optimiser.zero_grad()
            cross_entropy(net(batch), labels).backward()
            for weight, mask, total in zip(weights_of(net), masks, expected, strict=True):
                weight.grad *= mask
                total -= (weight * weight.grad).detach()
            optimiser.step()
    for score, total in zip(model.scores(Movement(training), (x, y)), expected, strict=True):
        assert_close(score, total, rtol=1e-7, atol=1e-12)


def test_edge_popup_trains_scores_over_frozen_weights_and_statistics() -> None:
    module, model = both()
    x, y = make_images(40)
    net = plain(module)
    scores = [weight.detach().abs() for weight in weights_of(net)]
    frozen = [weight.detach().clone() for weight in weights_of(net)]
    for batch, labels in zip(images(x).double().split(16), torch.from_numpy(y).split(16), strict=True):
        for part, score, weight in zip(layers_of(net), scores, frozen, strict=True):
            order = score.flatten().argsort(stable=True)[: round(0.5 * score.numel())]
            mask = torch.ones(score.numel(), dtype=torch.bool)
            mask[order] = False
            part.weight.data = weight * mask.view_as(weight)
        found = gradients(net, batch, labels)
        scores = [s - 0.1 * w * g for s, w, g in zip(scores, frozen, found, strict=True)]
    criterion = EdgePopup(0.5, Training(epochs=1, batchsize=16, optimiser=Descent(0.1)))
    for mine, score in zip(model.scores(criterion, (x, y)), scores, strict=True):
        assert_close(mine, score, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("criterion", FOR_PERCEPTRONS, ids=str)
def test_some_criteria_are_for_dense_layers_only(criterion: Saliency) -> None:
    _, model = both()
    data, before = make_images(), all_arrays(model)
    structure = Neurons() if criterion.of_neurons else Global()
    with pytest.raises(InvalidInput, match="is for networks of dense layers only"):
        model.scores(criterion, data)
    with pytest.raises(InvalidInput, match="is for networks of dense layers only"):
        model.prune(criterion, 0.5, structure, data)
    assert_same(all_arrays(model), before)


@pytest.mark.parametrize("criterion", FOR_PERCEPTRONS, ids=str)
def test_images_of_a_perceptron_are_features(criterion: Saliency) -> None:
    data = make_images(80, (2, 2, 2))
    layers = make_layers((8, 6, 5, 3))
    model, flat = build([Input((2, 2, 2)), Flatten("0"), *layers]), build(layers)
    assert_same(model.scores(criterion, data), flat.scores(criterion, data))
    for net in (model, flat):
        net.prune(criterion, 0.4, Neurons() if criterion.of_neurons else Global(), data)
    assert_same(all_arrays(model), all_arrays(flat))


# --- structures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsities", [(0.3, 0.8), (0.5, 0.5)])
@pytest.mark.parametrize("structure", [Global(), Layerwise()], ids=str)
def test_masks_are_those_of_torch(structure: Structure, sparsities: tuple[float, ...]) -> None:
    module, model = both()
    for part in layers_of(module):
        prune.remove(part, "weight")
    before = 0.0
    for sparsity in sparsities:
        model.prune(Magnitude(), sparsity, structure)
        parts = layers_of(module)
        for group in [parts] if isinstance(structure, Global) else [[part] for part in parts]:
            size = sum(part.weight.numel() for part in group)
            amount = round(sparsity * size) - round(before * size)
            prune.global_unstructured([(part, "weight") for part in group], prune.L1Unstructured, amount=amount)
        before = sparsity
        assert_same([layer.mask for layer in model.layers()], [part.weight_mask.bool() for part in parts])


@pytest.mark.parametrize("norm", [1, 2])
def test_filters_are_those_of_ln_structured(norm: int) -> None:
    module, model = both()
    model.prune(Magnitude(), (0.5, 0.25, 0.5), Neurons(layerwise=True, norm=norm))
    parts = layers_of(module)
    for part in parts:
        prune.remove(part, "weight")
    gone = []
    for part, amount in zip(parts[:3], (2, 1, 3), strict=True):
        prune.ln_structured(part, "weight", amount=amount, n=norm, dim=0)
        gone.append(part.weight_mask.flatten(1).sum(1) == 0)
    for part, below, places in zip(parts[1:], gone, (1, 12, 1), strict=True):
        mask = torch.ones_like(part.weight)
        mask[:, below.repeat_interleave(places)] = 0
        prune.custom_from_mask(part, "weight", mask)
    assert_same([layer.mask for layer in model.layers()], [part.weight_mask.bool() for part in parts])


def test_a_pruned_filter_is_one_that_the_network_does_not_use() -> None:
    _, model = both()
    x, _ = make_images()
    model.prune(Magnitude(), (0.5, 0.5, 0.0), Neurons(layerwise=True))
    outputs = model.forward(x)
    for part in model.parts():
        if isinstance(part, Layer) and part.bias is not None and part.name != "11":
            part.bias[~part.mask.reshape(len(part.mask), -1).any(1)] += 5
    assert_same([model.forward(x)], [outputs])


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4)])
def test_n_of_m_are_of_consecutive_channels_at_one_place_of_the_kernel(n: int, m: int) -> None:
    module = randomised(nn.Sequential(nn.Conv2d(8, 3, (2, 3)), nn.Flatten(), nn.Linear(12, 3)))
    model = build(parts_of(module, (8, 3, 4)))
    model.prune(Magnitude(), None, NofM(n, m, exclude=(-1,)))
    conv, dense = model.layers()
    groups = np.abs(module[0].weight.detach().numpy()).transpose(0, 2, 3, 1).reshape(-1, m)
    expected = np.zeros(groups.shape, bool)
    np.put_along_axis(expected, np.argsort(groups, 1)[:, m - n :], True, 1)
    np.testing.assert_array_equal(conv.mask.transpose(0, 2, 3, 1).reshape(-1, m), expected)
    assert dense.mask.all()


def test_a_group_that_is_sparser_already_is_named() -> None:
    module = randomised(nn.Sequential(nn.Conv2d(4, 3, (2, 3)), nn.Flatten(), nn.Linear(12, 3)))
    for structure, name in [
        (NofM(3, 4), r"inputs 0 to 3 at \(1, 2\) of the kernel of output 2 of layer 0"),
        (PerOutput(), "output 2 of layer 0"),
        (Layerwise(), "layer 0"),
        (Global(), "the network"),
    ]:
        parts = copies(parts_of(module, (4, 3, 4)))
        conv = parts[1]
        assert isinstance(conv, ConvLayer)
        conv.mask[2, :2, 1, 2] = False
        sparsity = 0.25 if isinstance(structure, NofM) else 0.0
        with pytest.raises(InvalidInput, match=f"of {name} means"):
            build(parts).prune(Magnitude(), sparsity, structure)


def test_nofm_needs_a_multiple_of_m_channels() -> None:
    _, model = both()
    with pytest.raises(InvalidInput, match=r"layer 0 has 2 inputs, not a multiple of m = 4"):
        model.prune(Magnitude(), None, NofM(2, 4))


@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.9])
def test_erdos_renyi_densities_are_as_the_sides_with_the_kernel(sparsity: float) -> None:
    _, model = both()
    model.prune(Magnitude(), sparsity, ERK())
    layers = model.layers()
    ratios = [la.density * la.weight.size / sum(la.weight.shape) for la in layers if la.density < 1]
    assert max(ratios) - min(ratios) < 0.1  # rounded counts
    total = sum(la.weight.size for la in layers)
    assert abs(sum(int((~la.mask).sum()) for la in layers) - round(sparsity * total)) <= len(layers) / 2
    assert all(sum(la.weight.shape) * min(ratios) >= la.weight.size - 1 for la in layers if la.density == 1)


def test_equal_weights_go_by_output_input_row_and_column() -> None:
    parts = copies(parts_of(image_module()))
    for part in parts:
        if isinstance(part, Layer):
            part.weight[:] = 1
    model = build(parts)
    for count in (1, 20, 75, 100):
        model.prune(Magnitude(), count / 410, Global())
        kept = np.concatenate([layer.mask.ravel() for layer in model.layers()])
        assert not kept[:count].any()
        assert kept[count:].all()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(STRUCTURES), st.lists(st.floats(0, 0.5), min_size=1, max_size=3), st.integers(0, 10**6))
def test_counts_are_exact_and_masks_only_lose(structure: Structure, sparsities: list[float], seed: int) -> None:
    model = build(parts_of(image_module(seed=seed % 5)))
    before = [layer.mask.copy() for layer in model.layers()]
    for sparsity in sorted(sparsities):
        model.prune(RandomSaliency(seed), sparsity, structure)
        layers = model.layers()
        pruned = [int((~layer.mask).sum()) for layer in layers]
        if isinstance(structure, Global):
            assert sum(pruned) == round(sparsity * 410)
        elif isinstance(structure, Layerwise):
            assert pruned == [round(sparsity * layer.mask.size) for layer in layers]
        elif isinstance(structure, PerOutput):
            for layer in layers:
                rows = (~layer.mask).reshape(len(layer.mask), -1)
                assert (rows.sum(1) == round(sparsity * rows.shape[1])).all()
        elif isinstance(structure, NofM):
            assert all((la.mask[:, ::2] | la.mask[:, 1::2]).all() for la in layers)
            assert sum(pruned) == (410 // 2 if round(sparsity * 2) else 0)
        elif isinstance(structure, Neurons):
            gone = sum(int((~la.mask.reshape(len(la.mask), -1).any(1)).sum()) for la in layers[:-1])
            assert gone == round(sparsity * 14)
        assert not any((layer.mask & ~was).any() for layer, was in zip(layers, before, strict=True))
        assert_pruned_are_zero(model)
        before = [layer.mask.copy() for layer in layers]


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
def test_every_criterion_prunes_weights_and_filters(criterion: Saliency) -> None:
    for structure in (Layerwise(), Neurons(layerwise=True)):
        _, model = both()
        model.prune(criterion, 0.5, structure, make_images())
        for layer in model.layers()[: -1 if isinstance(structure, Neurons) else None]:
            lost = (
                ~layer.mask
                if isinstance(structure, Layerwise)
                else ~layer.mask.any((1, 2, 3)[: layer.mask.ndim - 1])
            )
            assert lost.sum() == lost.size // 2
        assert_pruned_are_zero(model)


def test_filters_go_by_activation() -> None:
    _, model = both()
    x, y = make_images()
    scores = model.scores(Activation(), (x, y))
    model.prune(Activation(), 0.5, Neurons(layerwise=True), (x, y))
    for score, layer in zip(scores[:3], model.layers(), strict=False):
        gone = ~layer.mask.reshape(len(layer.mask), -1).any(1)
        assert set(np.flatnonzero(gone)) == set(np.argsort(score)[: len(score) // 2])


# --- regrowth --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [RigL(), SET(seed=1)], ids=str)
def test_weights_of_convolutions_move(method: Regrowth) -> None:
    module, model = both(0.5)
    x, y = make_images()
    before = copies(model.layers())
    model.regrow(method, 0.3, (x, y))
    net = plain(module)
    found = gradients(net, images(x).double(), torch.from_numpy(y))
    for was, now, g in zip(before, model.layers(), found, strict=True):
        assert isinstance(was, Layer)
        count = min(round(0.3 * int(was.mask.sum())), int((~was.mask).sum()))
        gone, grown = was.mask & ~now.mask, now.mask & ~was.mask
        assert gone.sum() == grown.sum() == count
        assert np.abs(was.weight[gone]).max() <= np.abs(was.weight[was.mask & ~gone]).min()
        assert not now.weight[grown].any()
        if isinstance(method, RigL):
            wish = g.abs().numpy()
            assert wish[grown].min() >= wish[~was.mask & ~grown].max()


# --- compact ---------------------------------------------------------------------------------------------


def random_module(rng: np.random.Generator) -> tuple[nn.Sequential, tuple[int, int, int]]:
    """A network of one to three convolutions and one or two dense layers, and all that can come between."""
    shape = (int(rng.integers(1, 4)), 9, 8)
    size, parts, torch_shape = shape, list[nn.Module](), torch.zeros(2, *shape)

    def add(*modules: nn.Module) -> None:
        nonlocal torch_shape
        for module in modules:
            parts.append(module.eval())
            torch_shape = module(torch_shape)

    def activation() -> list[nn.Module]:
        kind = rng.choice([0, 1, 2, 3], p=[0.2, 0.5, 0.2, 0.1])
        return [[nn.Identity()], [nn.ReLU()], [nn.Tanh()], [nn.Sigmoid()]][kind]

    def chance(p: float) -> bool:
        return bool(rng.random() < p)

    def pool() -> nn.Module:
        kind = nn.MaxPool2d if chance(0.4) else nn.AvgPool2d
        return kind(2, stride=int(rng.integers(1, 3)), padding=int(chance(0.4)))

    if chance(0.2):
        add(nn.BatchNorm2d(size[0]))
    for _ in range(rng.integers(1, 4)):
        kernel = tuple(int(min(n, rng.integers(1, 4))) for n in torch_shape.shape[2:])
        width, padding, stride = int(rng.integers(2, 6)), int(chance(0.4)), int(rng.integers(1, 3))
        add(nn.Conv2d(torch_shape.shape[1], width, kernel, stride, padding, bias=chance(0.7)), *activation())
        for _ in range(rng.integers(0, 3)):
            if chance(0.5):
                add(nn.BatchNorm2d(width), *activation())
            elif min(torch_shape.shape[2:]) > 1:
                add(pool())
    add(nn.Flatten())
    if chance(0.3):
        add(nn.BatchNorm1d(torch_shape.shape[1]), *activation())
    if chance(0.6):
        add(nn.Linear(torch_shape.shape[1], 4, bias=chance(0.7)), *activation())
        if chance(0.5):
            add(nn.BatchNorm1d(4), *activation())
    add(nn.Linear(torch_shape.shape[1], 3, bias=chance(0.7)))
    return randomised(nn.Sequential(*(part for part in parts if not isinstance(part, nn.Identity)))), shape


def silenced(parts: list[Part], rng: np.random.Generator) -> list[Part]:
    """The parts with some weights pruned, and all that come into or go out of some neurons; some biases are 0."""
    parts = copies(parts)
    layers = [part for part in parts if isinstance(part, Layer)]
    for place, layer in enumerate(layers):
        layer.mask[rng.random(layer.mask.shape) < 0.2] = False
        layer.mask[rng.random(len(layer.mask)) < 0.4] = False
        if place:
            below = len(layers[place - 1].mask)
            grouped = layer.mask.reshape(len(layer.mask), below, -1)
            grouped[:, rng.random(below) < 0.3] = False
        if layer.bias is not None:
            layer.bias[rng.random(len(layer.bias)) < 0.3] = 0
    return parts


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_a_compact_network_gives_the_same(first: int) -> None:
    smaller = 0
    for seed in range(first, first + 50):
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        module, shape = random_module(rng)
        model = build(silenced(parts_of(module, shape), rng))
        x, y = make_images(7, shape)
        before = all_arrays(model)
        small = model.compact()
        assert_same(all_arrays(model), before)
        assert_close(small.forward(x), model.forward(x), rtol=1e-4, atol=1e-5)
        shapes(small.parts())
        sizes = [sum(array.size for array in all_arrays(net)) for net in (small, model)]
        smaller += sizes[0] < sizes[1]
        small.start(Descent(0.01))
        small.train(x, y, np.arange(7), 7)
        again = model.compact().compact()
        assert [la.mask.shape for la in again.layers()] == [la.mask.shape for la in small.layers()]
    assert smaller > 25


def dead_filter(
    between: list[nn.Module], bias: float, padding: int = 0, places: int = 1
) -> tuple[TorchModel, TorchModel]:
    """A network of two filters, into one of which nothing comes, and what is compact of it."""
    width = nn.Sequential(nn.Conv2d(2, 2, 1), *between).eval()(torch.zeros(2, *IMAGE)).shape
    following = [nn.Flatten(), nn.Linear(math.prod(width[1:]), 3)]
    if padding >= 0:
        following = [nn.Conv2d(2, 3, 2, padding=padding), nn.Flatten()]
        following.append(nn.Linear(3 * (width[2] + 2 * padding - 1) * (width[3] + 2 * padding - 1), 3))
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 2, 1), *between, *following)
    for layer in layers_of(module):
        prune.custom_from_mask(layer, "weight", torch.ones_like(layer.weight))
    module[0].weight_mask[1] = 0
    module[0].bias.data[1] = bias
    model = build(parts_of(module.eval()))
    return model, model.compact()


def normal(bias: float, mean: float = 0.0) -> nn.BatchNorm2d:
    """x − mean + bias."""
    norm = nn.BatchNorm2d(2, eps=1e-30)
    norm.bias.data[:], norm.running_mean[:] = bias, mean
    return norm


@pytest.mark.parametrize(
    ("between", "bias", "padding", "goes"),
    [
        ([], 1.0, 0, True),
        ([], 1.0, 1, False),
        ([], 0.0, 1, True),
        ([nn.ReLU()], -1.0, 1, True),
        ([], 1.0, -1, True),  # a dense layer follows
        ([nn.MaxPool2d(2, padding=1)], 1.0, 0, True),  # which pads nothing that counts
        ([nn.MaxPool2d(2, padding=1)], 1.0, -1, True),
        ([nn.AvgPool2d(2, padding=1)], 1.0, -1, False),
        ([nn.AvgPool2d(2)], 1.0, -1, True),
        ([nn.AvgPool2d(2, padding=1)], 0.0, -1, True),
        ([normal(1.0)], -1.0, 1, True),  # 0 where the next layer pads
        ([normal(1.0)], 0.0, 1, False),
        ([normal(-2.0), nn.ReLU()], 1.0, 1, True),
        ([nn.AvgPool2d(2, padding=1), normal(1.0)], 0.0, 0, True),  # 0 where the pool pads
        ([nn.AvgPool2d(2, padding=1), normal(-2.0), nn.ReLU()], 3.0, 0, False),
        ([nn.AvgPool2d(2, padding=1), normal(-2.0), nn.ReLU()], 1.0, 0, False),  # 0 in the middle, and at the edge
        ([normal(1.0), nn.AvgPool2d(2, padding=1)], -1.0, 0, True),
    ],
)
def test_constants_that_are_not_0_stay_where_they_meet_padding(
    between: list[nn.Module], bias: float, padding: int, goes: bool
) -> None:
    model, small = dead_filter(between, bias, padding)
    assert len(small.layers()[0].weight) == (1 if goes else 2)
    x, _ = make_images()
    assert_close(small.forward(x), model.forward(x), rtol=1e-4, atol=1e-5)


def test_batch_normalisation_after_flatten_gives_a_channel_many_constants() -> None:
    module = randomised(
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.BatchNorm1d(48), nn.Tanh(), nn.Linear(48, 3))
    )
    parts = copies(parts_of(module))
    conv = parts[1]
    assert isinstance(conv, ConvLayer)
    conv.mask[1] = False
    model = build(parts)
    small = model.compact()
    assert [len(part.mean) for part in small.parts() if isinstance(part, BatchNorm)] == [32]
    assert [layer.mask.shape for layer in small.layers()] == [(2, 2, 3, 3), (3, 32)]
    x, _ = make_images()
    assert_close(small.forward(x), model.forward(x), rtol=1e-4, atol=1e-5)


def test_one_filter_of_a_collapsed_convolution_stays() -> None:
    parts = copies(parts_of(image_module()))
    layers = [part for part in parts if isinstance(part, Layer)]
    layers[1].mask[:] = False
    model = build(parts)
    small = model.compact()
    assert [layer.mask.shape[0] for layer in small.layers()] == [1, 1, 6, 3]
    x, _ = make_images()
    assert_close(small.forward(x), model.forward(x), rtol=1e-4, atol=1e-5)


def test_filters_pruned_are_gone_when_compact() -> None:
    _, model = both()
    model.prune(Magnitude(), (0.5, 0.5, 0.5), Neurons(layerwise=True))
    for part in model.parts():
        if isinstance(part, ConvLayer) and part.bias is not None:
            part.bias[:] = -9  # so that relu and batch normalisation make 0 of them, which padding may meet
        if isinstance(part, BatchNorm):
            part.weight[:] = np.abs(part.weight)
    small = model.compact()
    assert [layer.mask.shape for layer in small.layers()] == [(2, 2, 3, 3), (2, 2, 2, 1), (3, 24), (3, 3)]
    assert [len(part.mean) for part in small.parts() if isinstance(part, BatchNorm)] == [2, 3]
    assert [part for part in small.parts() if isinstance(part, Pool)] == [
        p for p in model.parts() if isinstance(p, Pool)
    ]
