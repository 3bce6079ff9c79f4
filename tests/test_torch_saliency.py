"""Scores and compensation of the reference engine, against torch's derivatives, least squares and plain loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch_networks import (
    arrays,
    assert_close,
    assert_pruned_are_zero,
    assert_same,
    build,
    flat_masks,
    make_data,
    make_layers,
    plant_nan,
    pruned_model,
)

from pyflux_prune.choices import (
    OBD,
    OBS,
    SALIENCIES,
    SNIP,
    Activation,
    Adam,
    EdgePopup,
    Global,
    GraSP,
    Layerwise,
    Magnitude,
    Momentum,
    Movement,
    Neurons,
    PerOutput,
    RandomSaliency,
    Redundancy,
    Saliency,
    Structure,
    SynFlow,
    Taylor,
    Threshold,
    Training,
    Wanda,
)
from pyflux_prune.engines.parts import ACTIVATIONS, Bool, Float, Int, Layer
from pyflux_prune.engines.torch import TorchModel
from pyflux_prune.errors import InvalidInput

pytestmark = pytest.mark.filterwarnings(
    "ignore::pyflux_prune.errors.LayerCollapse",
    "ignore:`torch.jit.script` is deprecated",  # by torch.func.hessian
)

ACT: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": torch.clone,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
CRITERIA: list[Saliency] = [
    Magnitude(),
    Magnitude(scaled=True),
    Threshold(),
    Threshold(tau=0.5),
    Taylor(),
    Taylor(squared=False, batchsize=7),
    SNIP(per_class=4),
    GraSP(per_class=4),
    SynFlow(iterations=4),
    OBD(),
    OBD(exact=True),
    OBS(iterations=3),
    OBS(full=True, iterations=3),
    Wanda(),
    Movement(Training(epochs=2, batchsize=9)),
    Activation(),
    Activation(zeros=True),
    Redundancy(),
    Redundancy(activations=True),
    EdgePopup(0.6, Training(epochs=2, batchsize=9, optimiser=Momentum(0.1))),
    RandomSaliency(),
]


def samples() -> tuple[Float, Int]:
    """Forty samples, fourteen or thirteen of each class."""
    x, _ = make_data()
    return x, np.random.default_rng(5).permutation(np.arange(40) % 3)


def doubles() -> tuple[Tensor, Tensor]:
    x, y = samples()
    return torch.tensor(x).double(), torch.tensor(y)


def weights_of(model: TorchModel) -> list[Tensor]:
    return [torch.tensor(layer.weight).double() for layer in model.layers()]


def biases_of(model: TorchModel) -> list[Tensor]:
    return [
        torch.zeros(len(layer.weight)).double() if layer.bias is None else torch.tensor(layer.bias).double()
        for layer in model.layers()
    ]


def masks_of(model: TorchModel) -> list[Tensor]:
    return [torch.tensor(layer.mask) for layer in model.layers()]


def function(model: TorchModel) -> Callable[..., list[Tensor]]:
    """Return the function of inputs, weights and biases to what enters the first layer, and what leaves each."""
    activations, own = [ACT[layer.activation] for layer in model.layers()], (weights_of(model), biases_of(model))

    def passed(x: Tensor, weights: Any = own[0], biases: Any = own[1]) -> list[Tensor]:
        found = [x]
        for act, weight, bias in zip(activations, weights, biases, strict=True):
            found.append(act(found[-1] @ weight.T + bias))
        return found

    return passed


def vector(model: TorchModel, with_biases: bool) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """The kept weights, and perhaps the biases, in a row, and the function of inputs and such a row to outputs."""
    passed, weights, biases = function(model), weights_of(model), biases_of(model)
    places = torch.cat([mask.flatten() for mask in masks_of(model)]).nonzero()[:, 0]
    shapes = [w.shape for w in weights]

    def outputs(x: Tensor, row: Tensor) -> Tensor:
        flat = torch.zeros(sum(s.numel() for s in shapes), dtype=torch.float64)
        flat = flat.index_put((places,), row[: len(places)])
        parts = [part.view(s) for part, s in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]
        if not with_biases:
            return passed(x, parts)[-1]
        return passed(x, parts, row[len(places) :].split([len(b) for b in biases]))[-1]

    row = torch.cat([w.flatten() for w in weights])[places]
    return torch.cat([row, *biases]) if with_biases else row, outputs


def of_kept(model: TorchModel, scores: Sequence[Any]) -> npt.NDArray[Any]:
    """The scores of kept weights in one row."""
    return np.concatenate([np.asarray(s)[la.mask] for s, la in zip(scores, model.layers(), strict=True)])


def assert_scores(model: TorchModel, actual: Sequence[Any], expected: Any, rtol: float = 1e-9) -> None:
    """Compare scores of kept weights, given layer by layer or in one row."""
    assert [s.shape for s in actual] == [layer.mask.shape for layer in model.layers()]
    assert all(s.dtype == np.float64 for s in actual)
    if isinstance(expected, list):
        expected = of_kept(model, expected)
    scale = np.abs(np.asarray(expected)).max()
    assert scale > 0
    assert_close(of_kept(model, actual), expected, rtol, rtol * float(scale))


# --- what holds for all ----------------------------------------------------------------------------------


def test_all_criteria_are_tested_here() -> None:
    assert {type(c) for c in CRITERIA} == set(SALIENCIES.values())


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
def test_scoring_gives_arrays_of_its_own_and_changes_nothing(criterion: Saliency) -> None:
    model = pruned_model(0.3)
    model.start(Adam())
    before, state = arrays(model), torch.get_rng_state()
    scores = model.scores(criterion, samples())
    assert_same(before, arrays(model))
    assert torch.equal(torch.get_rng_state(), state)
    in_single = criterion in (Magnitude(), RandomSaliency())
    for values, layer in zip(scores, model.layers(), strict=True):
        assert values.shape == (layer.mask.shape[:1] if criterion.of_neurons else layer.mask.shape)
        assert values.dtype == (np.float32 if in_single else np.float64)
        values[:] = -1
    assert_same(before, arrays(model))
    again = model.scores(criterion, samples())
    assert all((values != -1).any() for values in again)


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
def test_what_pruned_weights_hold_does_not_matter(criterion: Saliency) -> None:
    clean, dirty = pruned_model(0.3), pruned_model(0.3)
    structure = Neurons() if criterion.of_neurons else Global()
    plant_nan(dirty)
    assert_same(clean.scores(criterion, samples()), dirty.scores(criterion, samples()))
    plant_nan(dirty)
    for model in (clean, dirty):
        model.prune(criterion, 0.5, structure, samples())
    assert_same(arrays(clean), arrays(dirty))
    assert_pruned_are_zero(dirty)


@pytest.mark.parametrize("criterion", [c for c in CRITERIA if c.needs_data], ids=str)
@pytest.mark.parametrize("sparsity", [0.3, 0.6])
def test_criteria_that_need_data_say_so(criterion: Saliency, sparsity: float) -> None:
    """Also where there is nothing to prune."""
    model = pruned_model(0.3)
    before = arrays(model)
    message = f"data must be given, as the saliency {type(criterion).__name__} needs data"
    with pytest.raises(InvalidInput, match=message):
        model.scores(criterion)
    with pytest.raises(InvalidInput, match=message):
        model.prune(criterion, sparsity, Neurons() if criterion.of_neurons else Global())
    assert_same(before, arrays(model))


@pytest.mark.parametrize("criterion", [c for c in CRITERIA if not isinstance(c, EdgePopup)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_network_without_a_weight_can_be_scored(criterion: Saliency, bias: bool) -> None:
    layers = make_layers(bias=bias)
    for layer in layers:
        layer.mask[:] = False
    scores = build(layers).scores(criterion, samples())
    assert [len(s) for s in scores] == [6, 5, 3]
    if not isinstance(criterion, (Threshold, Redundancy, RandomSaliency, Activation)):
        assert not any(s.any() for s in scores)


@pytest.mark.parametrize("criterion", [c for c in CRITERIA if not c.needs_data], ids=str)
def test_criteria_that_need_no_data_ignore_them(criterion: Saliency) -> None:
    model = pruned_model(0.3)
    assert_same(model.scores(criterion), model.scores(criterion, samples()))


def test_an_unknown_saliency_is_named() -> None:
    model = build(make_layers())
    with pytest.raises(InvalidInput, match=r"saliency must be .* not 'weightiest'"):
        model.scores("weightiest")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"saliency must be .* not 'weightiest'"):
        model.prune("weightiest", 0.5, Global())  # type: ignore[arg-type]


# --- the weights alone -----------------------------------------------------------------------------------


def test_magnitude_scores_are_absolute_weights() -> None:
    model = build(make_layers())
    for values, layer in zip(model.scores(Magnitude()), model.layers(), strict=True):
        np.testing.assert_array_equal(values, np.abs(layer.weight))


def test_scaled_magnitudes_have_a_mean_square_of_1_in_each_layer() -> None:
    model = pruned_model()
    for layer in model.layers():
        layer.weight[:] *= 7
    for values, layer in zip(model.scores(Magnitude(scaled=True)), model.layers(), strict=True):
        assert np.mean(values[layer.mask] ** 2) == pytest.approx(1, rel=1e-5)
        np.testing.assert_array_equal(np.argsort(values[layer.mask]), np.argsort(abs(layer.weight[layer.mask])))


def test_layers_of_zeros_and_of_nothing_are_not_scaled() -> None:
    layers = make_layers()
    layers[0].weight[:], layers[2].mask[:] = 0, False
    scores = build(layers).scores(Magnitude(scaled=True))
    assert [s.any() for s in scores] == [False, True, False]
    assert all(np.isfinite(s).all() for s in scores)


def test_threshold_is_a_multiple_of_the_standard_deviation_of_kept_weights() -> None:
    model = pruned_model()
    for values, layer in zip(model.scores(Threshold(q=0.7)), model.layers(), strict=True):
        kept = layer.weight[layer.mask]
        assert_close(values[layer.mask], abs(kept) / (0.7 * kept.std()), rtol=1e-5)


def test_weights_on_the_threshold_stay() -> None:
    layers = make_layers()
    layers[0].weight[0, :3] = 0.1, -0.1, 0.0999
    model = build(layers)
    model.prune(Threshold(tau=0.1), None, Layerwise())
    for layer, before in zip(model.layers(), layers, strict=True):
        np.testing.assert_array_equal(layer.mask, abs(before.weight) >= np.float32(0.1))
    assert model.layers()[0].mask[0, :3].tolist() == [True, True, False]


def test_a_threshold_of_0_prunes_nothing() -> None:
    layers = make_layers()
    for layer in layers:
        layer.weight[:] = 0.25  # no spread
    model = build(layers)
    assert all(np.isposinf(s).all() for s in model.scores(Threshold()))
    model.prune(Threshold(), None, Global())
    assert flat_masks(model).all()


def test_random_scores_depend_on_the_seed_alone() -> None:
    model, other = build(make_layers()), build(make_layers(activation="relu", bias=False))
    torch.manual_seed(5)
    first = model.scores(RandomSaliency(3))
    torch.manual_seed(6)
    assert_same(first, other.scores(RandomSaliency(3)))
    assert all((values >= 0).all() and (values < 1).all() for values in first)
    assert not np.array_equal(first[0], model.scores(RandomSaliency(4))[0])
    assert not np.array_equal(first[0].ravel()[:30], first[1].ravel())


# --- gradients -------------------------------------------------------------------------------------------


def gradients(model: TorchModel, x: Tensor, y: Tensor) -> list[Tensor]:
    weights = [w.requires_grad_() for w in weights_of(model)]
    found = torch.autograd.grad(cross_entropy(function(model)(x, weights)[-1], y), weights)
    return [g * mask for g, mask in zip(found, masks_of(model), strict=True)]


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("batchsize", [7, 40, 100])
def test_taylor_is_the_mean_over_batches_of_the_first_order_change(squared: bool, batchsize: int) -> None:
    model, (x, y) = pruned_model(activation="relu"), doubles()
    expected = [torch.zeros_like(w) for w in weights_of(model)]
    starts = range(0, 40, batchsize)
    for start in starts:
        found = gradients(model, x[start : start + batchsize], y[start : start + batchsize])
        for total, weight, g in zip(expected, weights_of(model), found, strict=True):
            total += (weight * g) ** 2 if squared else (weight * g).abs()
    scores = model.scores(Taylor(squared=squared, batchsize=batchsize), samples())
    assert_scores(model, scores, [total / len(starts) for total in expected])


def balanced(per_class: int) -> tuple[Tensor, Tensor]:
    x, y = doubles()
    found: list[int] = []
    for n in range(40):
        if int((y[found] == y[n]).sum()) < per_class:
            found.append(n)
    return x[found], y[found]


@pytest.mark.parametrize("per_class", [1, 5, 13])
def test_snip_is_the_effect_of_each_mask_entry_on_the_loss_of_a_balanced_batch(per_class: int) -> None:
    """As in the paper: |∂L/∂c| for the indicators c = 1 of connections."""
    model, (x, y) = pruned_model(activation="sigmoid"), balanced(per_class)
    weights = weights_of(model)
    indicators = [torch.ones_like(w).requires_grad_() for w in weights]
    used = [w * c for w, c in zip(weights, indicators, strict=True)]
    expected = torch.autograd.grad(cross_entropy(function(model)(x, used)[-1], y), indicators)
    assert_scores(model, model.scores(SNIP(per_class), samples()), [e.abs() for e in expected])


@pytest.mark.parametrize("activation", ["tanh", "relu", "sigmoid", "identity"])
@pytest.mark.parametrize("temperature", [1.0, 50.0])
def test_grasp_is_the_weight_times_the_hessian_times_the_gradient(activation: str, temperature: float) -> None:
    model, (x, y) = pruned_model(activation=activation), balanced(6)
    row, outputs = vector(model, with_biases=False)

    def loss(row: Tensor) -> Tensor:
        return cross_entropy(outputs(x, row) / temperature, y)

    expected = row * (torch.func.hessian(loss)(row) @ torch.func.grad(loss)(row))
    assert_scores(model, model.scores(GraSP(6, temperature), samples()), expected)


def test_grasp_prunes_first_what_lessens_the_gradient_flow_most_in_keeping() -> None:
    """To first order, deleting w changes ‖g‖² by −2·w·(H g): the lowest score gains most."""
    model, (x, y) = build(make_layers()), balanced(10)
    row, outputs = vector(model, with_biases=False)

    def flow(row: Tensor) -> Tensor:
        return (torch.func.grad(lambda r: cross_entropy(outputs(x, r), y))(row) ** 2).sum()

    gain = -row * torch.func.grad(flow)(row)
    model.prune(GraSP(10, 1.0), 1 / len(row), Global(), samples())
    assert (~flat_masks(model)).nonzero()[0].tolist() == [int(gain.argmax())]


@pytest.mark.parametrize("criterion", [SNIP(14), GraSP(14)], ids=str)
def test_a_class_with_too_few_samples_is_named(criterion: Saliency) -> None:
    x, y = samples()
    model = pruned_model()
    before = arrays(model)
    assert np.bincount(y).tolist() == [14, 13, 13]
    name = type(criterion).__name__
    with pytest.raises(InvalidInput, match=f"{name} needs 14 samples of each .* has 13 of class 1"):
        model.scores(criterion, (x, y))
    with pytest.raises(InvalidInput, match="has 0 of class 2"):
        model.prune(criterion, 0.9, Global(), (x, y.clip(max=1)))
    assert_same(before, arrays(model))


# --- paths -----------------------------------------------------------------------------------------------


def test_synflow_is_the_weight_times_the_gradient_of_the_flow() -> None:
    model = pruned_model()
    weights = [w.abs().requires_grad_() for w in weights_of(model)]
    product = torch.linalg.multi_dot(weights[::-1])
    found = torch.autograd.grad(product.sum(), weights)
    scores = model.scores(SynFlow())
    assert_scores(model, scores, [(w * g).detach() for w, g in zip(weights, found, strict=True)])
    assert_close([s.sum() for s in scores], [product.sum().item()] * 3, rtol=1e-9)  # what is lost is conserved


def test_synflow_collapses_no_layer_where_magnitude_does() -> None:
    layers = make_layers((20, 20, 20, 3))
    layers[1].weight[:] *= 1e-3
    model, other = build(layers), build(layers)
    model.prune(SynFlow(), 0.97, Global())
    other.prune(Magnitude(), 0.97, Global())
    assert all(layer.mask.any() for layer in model.layers())
    assert not other.layers()[1].mask.any()
    assert (~flat_masks(model)).sum() == round(0.97 * 860)


# --- optimal brain damage --------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_exact_obd_is_the_diagonal_of_the_hessian(activation: str, bias: bool) -> None:
    model, (x, y) = pruned_model(0.4, activation=activation, bias=bias), doubles()
    row, outputs = vector(model, with_biases=False)
    hessian = torch.func.hessian(lambda row: cross_entropy(outputs(x, row), y))(row)
    assert_scores(model, model.scores(OBD(exact=True), samples()), row**2 * hessian.diagonal() / 2)


def test_exact_obd_knows_an_activation_after_the_last_layer_too() -> None:
    layers = make_layers()
    layers[-1] = replace(layers[-1], activation="tanh")
    model, (x, y) = build(layers), doubles()
    row, outputs = vector(model, with_biases=False)
    hessian = torch.func.hessian(lambda row: cross_entropy(outputs(x, row), y))(row)
    assert_scores(model, model.scores(OBD(exact=True), samples()), row**2 * hessian.diagonal() / 2)


def test_the_recursion_is_exact_in_the_last_layer() -> None:
    model = pruned_model(0.4)
    exact, approximate = (model.scores(OBD(exact=e), samples()) for e in (True, False))
    assert_close(approximate[-1], exact[-1], rtol=1e-9)
    assert not np.allclose(approximate[0], exact[0], rtol=0.1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_obd_is_lecuns_recursion(activation: str) -> None:
    layers = make_layers(activation=activation)
    layers[-1] = replace(layers[-1], activation=activation)
    for layer in layers:
        layer.mask[0, 1:3] = False
    model, (x, _) = build(layers), doubles()
    slope: dict[str, Callable[[float], float]] = {
        "identity": lambda a: 1,
        "relu": lambda a: float(a > 0),
        "tanh": lambda a: 1 / math.cosh(a) ** 2,
        "sigmoid": lambda a: 1 / (2 + 2 * math.cosh(a)),
    }
    weights, biases = weights_of(model), biases_of(model)
    expected = [torch.zeros_like(w) for w in weights]
    for sample in x:
        here = function(model)(sample)
        t = [float(p * (1 - p)) for p in here[-1].softmax(0)]
        for place in (2, 1, 0):
            a = here[place] @ weights[place].T + biases[place]
            d = [slope[activation](float(a_i)) ** 2 * t_i for a_i, t_i in zip(a, t, strict=True)]
            for i, j in itertools.product(*map(range, weights[place].shape)):
                expected[place][i, j] += weights[place][i, j] ** 2 / 2 * d[i] * here[place][j] ** 2 / len(x)
            t = [sum(float(w) ** 2 * d_i for w, d_i in zip(column, d, strict=True)) for column in weights[place].T]
    assert_scores(model, model.scores(OBD(), samples()), expected)


def test_exact_obd_is_for_small_networks() -> None:
    x, y = samples()
    model = build(make_layers((7, 2500, 3)))
    with pytest.raises(InvalidInput, match=r"OBD with exact=True takes at most 20,000 parameters, .* has 27,503"):
        model.scores(OBD(exact=True), (x, y))
    assert np.isfinite(build(make_layers((7, 1800, 3))).scores(OBD(exact=False), (x, y))[0]).all()


# --- optimal brain surgeon, by layer ---------------------------------------------------------------------


def layer_inputs(model: TorchModel) -> list[npt.NDArray[np.float64]]:
    return [h.numpy() for h in function(model)(doubles()[0])[:-1]]


def test_obs_by_layer_scores_the_error_of_the_best_row_without_the_weight() -> None:
    """½·E[(w − w')·x]² of the w' that torch.linalg.lstsq finds."""
    model = pruned_model(0.3)
    scores = model.scores(OBS(damping=0.0), samples())
    expected = [np.full(layer.mask.shape, np.nan) for layer in model.layers()]
    for layer, x, found in zip(model.layers(), layer_inputs(model), expected, strict=True):
        for i, j in zip(*layer.mask.nonzero(), strict=True):
            others = layer.mask[i].copy()
            others[j] = False
            inputs, target = torch.tensor(x[:, others]), torch.tensor(x @ layer.weight[i].astype(np.float64))
            best = torch.linalg.lstsq(inputs, target[:, None]).solution[:, 0] if others.any() else torch.zeros(0)
            found[i, j] = float(((target - inputs @ best.double()) ** 2).mean() / 2)
    assert_scores(model, scores, expected, rtol=1e-8)


@pytest.mark.parametrize("damping", [0.01, 0.5])
def test_damping_is_added_in_units_of_the_mean_of_the_diagonal(damping: float) -> None:
    model = pruned_model(0.3)
    expected = []
    for layer, x in zip(model.layers(), layer_inputs(model), strict=True):
        hessian = x.T @ x / len(x)
        hessian += damping * np.trace(hessian) / len(hessian) * np.eye(len(hessian))
        found = np.full(layer.mask.shape, np.nan)
        for i, kept in enumerate(layer.mask):
            found[i, kept] = (
                layer.weight[i, kept].astype(float) ** 2
                / 2
                / np.linalg.inv(hessian[np.ix_(kept, kept)]).diagonal()
            )
        expected.append(found)
    assert_scores(model, model.scores(OBS(damping=damping), samples()), expected)


@pytest.mark.parametrize("structure", [Layerwise(), Global(), PerOutput(), Neurons()], ids=str)
def test_survivors_of_obs_are_the_least_squares_solution(structure: Structure) -> None:
    """Each row that loses weights reproduces what it gave before, as well as the weights that stay can."""
    model = pruned_model(0.2)
    before, x = (
        [replace(la, weight=la.weight.copy(), mask=la.mask.copy()) for la in model.layers()],
        layer_inputs(model),
    )
    model.prune(OBS(damping=0.0, iterations=1), 0.5, structure, samples())
    assert_pruned_are_zero(model)
    moved = 0
    for old, new, inputs in zip(before, model.layers(), x, strict=True):
        for i, kept in enumerate(new.mask):
            if (kept == old.mask[i]).all():
                np.testing.assert_array_equal(new.weight[i], old.weight[i])
            elif kept.any():
                target = torch.tensor(inputs @ old.weight[i].astype(np.float64))[:, None]
                best = torch.linalg.lstsq(torch.tensor(inputs[:, kept]), target).solution[:, 0]
                assert_close(new.weight[i, kept], best, rtol=1e-5, atol=1e-6)
                moved += 1
        assert_same([old.bias], [new.bias])
    assert moved


def test_compensation_is_damped_as_scores_are() -> None:
    model = build(make_layers())
    before, x = arrays(model), layer_inputs(model)
    model.prune(OBS(damping=0.3, iterations=1), 0.5, Layerwise(), samples())
    for old, layer, inputs in zip(before[::3], model.layers(), x, strict=True):
        hessian = inputs.T @ inputs / len(inputs)
        hessian += 0.3 * np.trace(hessian) / len(hessian) * np.eye(len(hessian))
        for w, new, k in zip(old.astype(np.float64), layer.weight, layer.mask, strict=True):
            change = np.linalg.solve(hessian[np.ix_(k, k)], hessian[np.ix_(k, ~k)] @ w[~k]) if k.any() else 0
            assert_close(new[k], w[k] + change, rtol=1e-5, atol=1e-6)


def test_compensation_helps() -> None:
    x, _ = samples()
    model, plain = build(make_layers()), build(make_layers())
    outputs = model.forward(x)
    model.prune(OBS(iterations=1), 0.4, Layerwise(), samples())
    plain.load(make_layers())
    plain.load([replace(la, mask=mine.mask) for la, mine in zip(make_layers(), model.layers(), strict=True)])
    assert np.square(model.forward(x) - outputs).sum() < 0.5 * np.square(plain.forward(x) - outputs).sum()


@pytest.mark.parametrize("full", [False, True])
def test_steps_of_obs_are_prunings_to_densities_that_fall_exponentially(full: bool) -> None:
    model, twin = build(make_layers()), build(make_layers())
    model.prune(OBS(full=full, iterations=3), 0.8, Global(), samples())
    n, last = 87, 87 - round(0.8 * 87)
    for kept in (round(n * (last / n) ** (1 / 3)), round(n * (last / n) ** (2 / 3)), last):
        twin.prune(OBS(full=full, iterations=1), 1 - kept / n, Global(), samples())
        assert flat_masks(twin).sum() == kept
    assert_same(arrays(model), arrays(twin))


def test_a_singular_hessian_names_the_layer_and_asks_for_damping() -> None:
    x, y = samples()
    x[:, 2] = 0
    model = pruned_model(0.1)
    model.start(Adam())
    before = arrays(model)
    for call in (
        lambda c: model.scores(c, (x, y)),
        lambda c: model.prune(c, 0.5, Layerwise(), (x, y)),
    ):
        with pytest.raises(InvalidInput, match=r"Hessian of layer 0 is singular.* larger damping"):
            call(OBS(damping=0.0))
    assert_same(before, arrays(model))
    model.prune(OBS(damping=1e-6), 0.5, Layerwise(), (x, y))
    x[:, 2] = x[:, 1] * (1 + 1e-15)  # singular but for rounding
    with pytest.raises(InvalidInput, match="singular"):
        build(make_layers()).scores(OBS(damping=0.0), (x, y))
    with pytest.raises(InvalidInput, match="singular"):
        build(make_layers()).scores(OBS(damping=0.0), (samples()[0][:6], y[:6]))  # fewer samples than inputs


def test_an_input_that_no_row_keeps_needs_no_damping() -> None:
    x, y = samples()
    x[:, 2] = 0
    layers = make_layers()
    layers[0].mask[:, 2] = False
    model = build(layers)
    model.prune(OBS(damping=0.0), 0.5, Layerwise(), (x, y))
    assert all(np.isfinite(a).all() for a in arrays(model))


def test_a_row_may_lose_all() -> None:
    layers = make_layers()
    layers[0].weight[2] *= 1e-4
    model = build(layers)
    model.prune(OBS(iterations=2), 0.2, Layerwise(), samples())
    assert not model.layers()[0].mask[2].any()
    assert_pruned_are_zero(model)


# --- optimal brain surgeon, full -------------------------------------------------------------------------


def gauss_newton(model: TorchModel, damping: float, with_biases: bool = True) -> tuple[Tensor, Tensor]:
    """Kept weights, and biases, and the Hessian of the loss of the network that is linear in them."""
    x, y = doubles()
    row, outputs = vector(model, with_biases)
    value, jacobian = outputs(x, row), torch.func.jacrev(outputs, argnums=1)(x, row)
    hessian = torch.func.hessian(lambda r: cross_entropy(value + jacobian @ (r - row), y))(row)
    return row, hessian + damping * hessian.diagonal().mean() * torch.eye(len(row))


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_full_obs_uses_the_hessian_of_the_linearised_network(activation: str) -> None:
    model = pruned_model(0.3, activation=activation)
    row, matrix = gauss_newton(model, 0.1)
    n = int(flat_masks(model).sum())
    expected = (row**2 / (2 * torch.linalg.inv(matrix).diagonal()))[:n]
    assert_scores(model, model.scores(OBS(full=True, damping=0.1), samples()), expected, rtol=1e-7)


def test_full_obs_of_one_layer_uses_the_hessian_itself() -> None:
    model, (x, y) = pruned_model(0.3, widths=(7, 3)), doubles()
    row, outputs = vector(model, with_biases=True)
    hessian = torch.func.hessian(lambda r: cross_entropy(outputs(x, r), y))(row)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(row))
    expected = (row**2 / (2 * torch.linalg.inv(hessian).diagonal()))[: int(flat_masks(model).sum())]
    assert_scores(model, model.scores(OBS(full=True), samples()), expected, rtol=1e-8)


def test_full_obs_takes_networks_without_biases() -> None:
    model = pruned_model(0.3, bias=False)
    row, hessian = gauss_newton(model, 0.01, with_biases=False)
    expected = row**2 / (2 * torch.linalg.inv(hessian).diagonal())
    assert_scores(model, model.scores(OBS(full=True), samples()), expected, rtol=1e-7)
    model.prune(OBS(full=True), 0.6, Global(), samples())
    assert all(layer.bias is None for layer in model.layers())


def test_full_compensation_minimises_the_quadratic_form() -> None:
    """Its gradient G·(θ' − θ) vanishes in all that stays, biases too."""
    model = pruned_model(0.3)
    row, matrix = gauss_newton(model, 0.05)
    before, kept = arrays(model), flat_masks(model)
    model.prune(OBS(full=True, damping=0.05, iterations=1), 0.5, Global(), samples())
    weights = torch.cat([w.flatten() for w in weights_of(model)])[torch.tensor(kept)]
    change = torch.cat([weights, *biases_of(model)]) - row
    stays = torch.cat([torch.tensor(flat_masks(model)[kept]), torch.ones(14, dtype=torch.bool)])
    assert (change[~stays] == -row[~stays]).all()
    assert change[-14:].abs().min() > 1e-5
    slope = matrix @ change
    assert slope[stays].abs().max() < 1e-5 * slope[~stays].abs().max()
    assert not np.array_equal(before[2], arrays(model)[2])


def test_full_obs_without_damping_is_singular() -> None:
    """Of a softmax, all biases of the last layer can rise together."""
    model = pruned_model()
    before = arrays(model)
    with pytest.raises(InvalidInput, match=r"Hessian of the network is singular.* larger damping"):
        model.prune(OBS(full=True, damping=0.0), 0.9, Global(), samples())
    assert_same(before, arrays(model))


def test_full_obs_is_for_small_networks() -> None:
    x, y = samples()
    model = build(make_layers((7, 500, 3)))
    with pytest.raises(InvalidInput, match=r"at most 5,000 kept weights and biases, .* has 5,503"):
        model.scores(OBS(full=True), (x, y))
    model.prune(Magnitude(), 0.95, Global())
    assert np.isfinite(model.scores(OBS(full=True), (x, y))[0]).all()


# --- activations -----------------------------------------------------------------------------------------


def test_wanda_is_the_weight_times_the_norm_of_its_input() -> None:
    model = pruned_model(activation="relu")
    expected = [
        np.abs(layer.weight.astype(np.float64)) * np.sqrt((x**2).sum(0))
        for layer, x in zip(model.layers(), layer_inputs(model), strict=True)
    ]
    assert_scores(model, model.scores(Wanda(), samples()), expected)


def test_activation_is_the_mean_magnitude_or_the_share_that_is_not_zero() -> None:
    model = pruned_model(activation="relu")
    outputs = [h.numpy() for h in function(model)(doubles()[0])[1:]]
    for values, out in zip(model.scores(Activation(), samples()), outputs, strict=True):
        assert_close(values, np.abs(out).mean(0), rtol=1e-9)
    for values, out in zip(model.scores(Activation(zeros=True), samples()), outputs, strict=True):
        np.testing.assert_array_equal(values, (out != 0).mean(0))
    assert (model.scores(Activation(zeros=True), samples())[0] < 1).any()


# --- learned scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [
    Training(epochs=3, batchsize=9, optimiser=Momentum(0.2, 0.8), decay=0.5),
    Training(epochs=2, batchsize=40, optimiser=Adam(0.02)),
], ids=["Momentum", "Adam"])  # fmt: skip
def test_movement_adds_up_how_far_training_drives_weights_from_zero(training: Training) -> None:
    model, (x, y) = pruned_model(), doubles()
    expected = [torch.zeros_like(w) for w in weights_of(model)]
    weights, biases, masks = weights_of(model), biases_of(model), masks_of(model)
    parameters = [*weights, *biases]
    memory = [[torch.zeros_like(p), torch.zeros_like(p)] for p in parameters]
    step = 0
    for epoch in range(training.epochs):
        eta = training.optimiser.eta * training.decay**epoch
        for start in range(0, 40, training.batchsize):
            step += 1
            for p in parameters:
                p.requires_grad_()
            batch = slice(start, start + training.batchsize)
            loss = cross_entropy(function(model)(x[batch], weights, biases)[-1], y[batch])
            found = list(torch.autograd.grad(loss, parameters))
            for place, mask in enumerate(masks):
                found[place] = found[place] * mask
                expected[place] -= weights[place].detach() * found[place]
            for p, (m, v), g in zip(parameters, memory, found, strict=True):
                p.requires_grad_(False)
                if isinstance(training.optimiser, Momentum):
                    p -= m.mul_(0.8).add_(eta * g)
                else:
                    m.mul_(0.9).add_(0.1 * g)
                    v.mul_(0.999).add_(0.001 * g**2)
                    p -= eta * m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    assert_scores(model, model.scores(Movement(training), samples()), expected)


def test_movement_of_no_training_is_nothing() -> None:
    assert not any(s.any() for s in build(make_layers()).scores(Movement(Training(epochs=0)), samples()))


def lowest(scores: npt.NDArray[Any], mask: Bool, sparsity: float) -> Bool:
    """The mask that leaves ``round(sparsity·n)`` of a layer pruned."""
    left = mask.copy().ravel()
    order = sorted(np.flatnonzero(left), key=lambda i: (scores.ravel()[i], i))
    left[order[: round(sparsity * left.size) - int((~left).sum())]] = False
    return left.reshape(mask.shape)


@pytest.mark.parametrize("optimiser", [Momentum(0.5, 0.9), Adam(0.05)], ids=str)
def test_edge_popup_trains_scores_over_frozen_weights(optimiser: Any) -> None:
    training = Training(epochs=3, batchsize=9, optimiser=optimiser, decay=0.9)
    model, (x, y) = pruned_model(0.2), doubles()
    weights, masks = weights_of(model), [layer.mask for layer in model.layers()]
    scores = [w.abs() for w in weights]
    memory = [[torch.zeros_like(s), torch.zeros_like(s)] for s in scores]
    step, chosen = 0, []
    for epoch in range(training.epochs):
        eta = optimiser.eta * 0.9**epoch
        for start in range(0, 40, 9):
            step += 1
            m = [torch.tensor(lowest(s.numpy(), k, 0.6)) for s, k in zip(scores, masks, strict=True)]
            chosen.append(torch.cat([part.flatten() for part in m]))
            used = [(w * part).requires_grad_() for w, part in zip(weights, m, strict=True)]
            found = torch.autograd.grad(
                cross_entropy(function(model)(x[start : start + 9], used)[-1], y[start : start + 9]), used
            )
            for s, w, (one, two), g in zip(scores, weights, memory, found, strict=True):
                change = g * w
                if isinstance(optimiser, Momentum):
                    s -= one.mul_(0.9).add_(eta * change)
                else:
                    one.mul_(0.9).add_(0.1 * change)
                    two.mul_(0.999).add_(0.001 * change**2)
                    s -= eta * one / (1 - 0.9**step) / ((two / (1 - 0.999**step)).sqrt() + 1e-8)
    assert (chosen[0] != chosen[-1]).any()  # training matters
    assert_scores(model, model.scores(EdgePopup(0.6, training), samples()), scores)


def test_edge_popup_finds_a_better_network_in_a_random_one() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(120) % 3
    x = rng.normal(size=(120, 7)).astype(np.float32)
    x[np.arange(120), y] += 2
    popup, magnitude = build(make_layers((7, 30, 3))), build(make_layers((7, 30, 3)))
    popup.prune(EdgePopup(0.5, Training(epochs=30, optimiser=Momentum(0.5, 0.9))), 0.5, Layerwise(), (x, y))
    magnitude.prune(Magnitude(), 0.5, Layerwise())
    assert popup.evaluate(x, y)[1] > magnitude.evaluate(x, y)[1] + 0.2
    for layer, before in zip(popup.layers(), make_layers((7, 30, 3)), strict=True):
        np.testing.assert_array_equal(layer.weight, np.where(layer.mask, before.weight, 0))


def test_edge_popup_of_a_sparser_layer_is_refused() -> None:
    model = pruned_model(0.7)
    with pytest.raises(InvalidInput, match=r"0\.3 of layer 0 means 13 of 42 weights pruned, but"):
        model.scores(EdgePopup(0.3, Training(epochs=1)), samples())


# --- redundancy ------------------------------------------------------------------------------------------


def replacement(model: TorchModel, activations: bool, place: int, j: int, i: int) -> tuple[float, float, float]:
    """Cost, α and β of replacing neuron j of a layer by neuron i."""
    layer, following = model.layers()[place], model.layers()[place + 1]
    out = float(np.square(following.weight[:, j].astype(np.float64)).sum())
    if activations:
        h = function(model)(doubles()[0])[place + 1].numpy()
        columns = [h[:, [i]]] if following.bias is None else [h[:, [i]], np.ones((len(h), 1))]
        if h[:, i].min() == h[:, i].max():
            columns[0] = 0 * columns[0]
        solution = np.linalg.lstsq(np.hstack(columns), h[:, j], rcond=None)[0]
        residual = h[:, j] - np.hstack(columns) @ solution
        return float(np.mean(residual**2) * out), solution[0], solution[1] if following.bias is not None else 0.0
    u = layer.weight.astype(np.float64)
    u = u if layer.bias is None else np.column_stack([u, layer.bias])
    alpha = 1.0
    if layer.activation in ("relu", "identity"):
        alpha = max(0.0, u[j] @ u[i] / (u[i] @ u[i])) if u[i].any() else 0.0
    return float(np.square(u[j] - alpha * u[i]).sum() * out), alpha, 0.0


def alive(model: TorchModel, place: int) -> Bool:
    here, after = model.layers()[place].mask, model.layers()[place + 1].mask
    return here.any(1) & after.any(0)


def greedy(model: TorchModel, activations: bool) -> list[npt.NDArray[np.float64]]:
    scores = []
    for place in range(len(model.layers()) - 1):
        left = [int(j) for j in np.flatnonzero(alive(model, place))]
        found, last = np.zeros(len(model.layers()[place].weight)), 0.0
        while len(left) > 1:
            cost, j, _ = min(
                (replacement(model, activations, place, j, i)[0], j, i) for j, i in itertools.permutations(left, 2)
            )
            found[j] = last = max(cost, last)
            left.remove(j)
        found[left] = np.inf
        scores.append(found)
    return [*scores, np.full(len(model.layers()[-1].weight), np.inf)]


@pytest.mark.parametrize("activations", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_redundancy_replaces_the_cheapest_first(activations: bool, activation: str, bias: bool) -> None:
    model = pruned_model(0.4, activation=activation, bias=bias)
    for values, expected in zip(
        model.scores(Redundancy(activations), samples()), greedy(model, activations), strict=True
    ):
        assert_close(values, expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("activations", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_pruned_neurons_are_folded_into_their_cheapest_replacement(
    activations: bool, activation: str, bias: bool
) -> None:
    model = pruned_model(0.3, activation=activation, bias=bias)
    before = [
        replace(la, weight=la.weight.copy(), mask=la.mask.copy(), bias=None if la.bias is None else la.bias.copy())
        for la in model.layers()
    ]
    was_alive = [alive(model, place) for place in range(2)]
    scores = greedy(model, activations)
    pruned = [int((~a).sum()) + 2 for a in was_alive]
    gone = [np.argsort(np.where(a, s, np.inf), kind="stable")[:2] for a, s in zip(was_alive, scores, strict=False)]
    expected = [la.weight.astype(np.float64) for la in before]
    biases = [None if la.bias is None else la.bias.astype(np.float64) for la in before]
    for place in range(2):
        stay = [int(i) for i in np.flatnonzero(was_alive[place]) if i not in gone[place]]
        for j in sorted(gone[place]):
            _, i = min((replacement(model, activations, place, int(j), i)[0], i) for i in stay)
            _, alpha, beta = replacement(model, activations, place, int(j), i)
            expected[place + 1][:, i] += alpha * before[place + 1].weight[:, j]
            if biases[place + 1] is not None:
                biases[place + 1] += beta * before[place + 1].weight[:, j]
    masks = [la.mask.copy() for la in before]
    for place in range(2):
        masks[place][gone[place]] = False
        masks[place + 1][:, gone[place]] = False

    shares = tuple(p / len(la.weight) for p, la in zip(pruned, before, strict=False))
    model.prune(Redundancy(activations), shares, Neurons(layerwise=True), samples())
    for layer, weight, bias_, mask in zip(model.layers(), expected, biases, masks, strict=True):
        np.testing.assert_array_equal(layer.mask, mask)
        assert_close(layer.weight, np.where(mask, weight, 0), rtol=1e-5, atol=1e-5)
        assert (layer.bias is None) == (bias_ is None)
        if layer.bias is not None:
            assert_close(layer.bias, bias_, rtol=1e-5, atol=1e-5)


def with_duplicates(activation: str, factors: Sequence[float]) -> list[Layer]:
    """Neurons 4 and 5 of the first layer are multiples of neurons 1 and 2."""
    layers = make_layers(activation=activation)
    first = layers[0]
    assert first.bias is not None
    for copy, original, factor in zip((4, 5), (1, 2), factors, strict=True):
        first.weight[copy] = np.float32(factor) * first.weight[original]
        first.bias[copy] = np.float32(factor) * first.bias[original]
    return layers


@pytest.mark.parametrize("activations", [True, False])
@pytest.mark.parametrize(
    ("activation", "factors"),
    [*((a, (1.0, 1.0)) for a in ACTIVATIONS), ("relu", (0.5, 4.0)), ("identity", (3.0, 0.7))],
)
def test_duplicates_cost_nothing_and_are_pruned_without_a_trace(
    activations: bool, activation: str, factors: tuple[float, float]
) -> None:
    x, y = samples()
    layers = with_duplicates(activation, factors)
    model = build(layers)
    outputs, scores = model.forward(x), model.scores(Redundancy(activations), (x, y))[0]
    if factors == (1.0, 1.0):
        assert activations or scores[[1, 2]].tolist() == [0, 0]  # of equals the first goes
    cheap = np.argsort(scores)[:2]
    assert {frozenset(int(c) % 3 for c in cheap)} == {frozenset({1, 2})}
    assert scores[cheap].max() < 1e-9 < np.sort(scores)[2]
    model.prune(Redundancy(activations), (1 / 3, 0.0), Neurons(layerwise=True), (x, y))
    assert sorted(np.flatnonzero(~model.layers()[0].mask.any(1))) == sorted(cheap)
    assert_close(model.forward(x), outputs, rtol=1e-4, atol=1e-5)
    plain = build(layers)
    plain.load([replace(la, mask=mine.mask) for la, mine in zip(layers, model.layers(), strict=True)])
    assert abs(plain.forward(x) - outputs).max() > 0.1


def test_a_negative_multiple_is_no_duplicate_by_weights_but_is_by_activations() -> None:
    model = build(with_duplicates("identity", (-2.0, -2.0)))
    x, y = samples()
    assert np.sort(model.scores(Redundancy())[0])[0] > 1e-3
    assert np.sort(model.scores(Redundancy(activations=True), (x, y))[0])[1] < 1e-9
    outputs = model.forward(x)
    model.prune(Redundancy(activations=True), (1 / 3, 0.0), Neurons(layerwise=True), (x, y))
    assert_close(model.forward(x), outputs, rtol=1e-4, atol=1e-4)


def test_a_constant_neuron_goes_into_the_bias() -> None:
    x, y = samples()
    layers = make_layers()
    layers[0].weight[3, 1:] = 0
    layers[0].mask[3, 1:] = False
    x[:, 0] = 0.3  # all that neuron 3 sees
    model = build(layers)
    outputs, scores = model.forward(x), model.scores(Redundancy(activations=True), (x, y))[0]
    assert scores.argmin() == 3
    assert scores[3] < 1e-12
    model.prune(Redundancy(activations=True), (1 / 6, 0.0), Neurons(layerwise=True), (x, y))
    assert not model.layers()[0].mask[3].any()
    assert_close(model.forward(x), outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", range(33, 39))
def test_a_constant_explains_nothing_but_a_constant(count: int) -> None:
    """Whatever the rounding of its mean: what is folded into it goes into the bias."""
    x, y = samples()
    model = build(make_layers())
    before = arrays(model)
    model.prune(Redundancy(activations=True), (0.7, 0.0), Neurons(layerwise=True), (x[[3] * count], y[:count]))
    stays = model.layers()[0].mask.any(1)
    assert stays.sum() == 2
    np.testing.assert_array_equal(model.layers()[1].weight[:, stays], before[3][:, stays])
    assert abs(model.layers()[1].bias - before[5]).min() > 1e-3


def test_a_neuron_that_is_not_alive_replaces_nobody() -> None:
    layers = with_duplicates("relu", (1.0, -1.0))
    layers[1].weight[:, 1] *= 1e-3  # the first to go, and 4 would replace it at no cost
    layers[1].mask[:, 4] = False
    model = build(layers)
    costs = {i: replacement(model, False, 0, 1, i) for i in (0, 2, 3, 5)}
    best = min(costs, key=lambda i: costs[i][0])
    model.prune(Redundancy(), (1 / 3, 0.0), Neurons(layerwise=True))
    assert not model.layers()[0].mask[1].any()
    expected = layers[1].weight.copy()
    expected[:, best] += costs[best][1] * expected[:, 1]
    assert costs[best][1] > 0
    expected[:, [1, 4]] = 0
    assert_close(model.layers()[1].weight, expected, rtol=1e-6)


def test_neurons_that_are_not_alive_score_0_and_replace_nobody() -> None:
    layers = with_duplicates("relu", (1.0, 1.0))
    layers[1].mask[:, 4] = False  # no way out of the duplicate of 1
    layers[0].mask[2] = False  # nor into what 5 duplicates
    model = build(layers)
    scores = model.scores(Redundancy())[0]
    assert scores[[2, 4]].tolist() == [0, 0]
    assert (scores[[0, 1, 3, 5]] > 1e-3).all()
    assert np.isinf(scores).sum() == 1
    assert np.isposinf(model.scores(Redundancy())[-1]).all()


def test_without_anyone_to_replace_them_neurons_are_just_pruned() -> None:
    model = build(make_layers())
    before = arrays(model)
    model.prune(Redundancy(), (0.99, 0.0), Neurons(layerwise=True))  # all six
    assert not model.layers()[0].mask.any()
    assert_same([before[5], before[6], before[8]], [arrays(model)[5], arrays(model)[6], arrays(model)[8]])
