"""The reference engine against torch itself, the equations of Optimisers.jl and the words of the design."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import prune as torch_prune

from pyflux_prune.choices import (
    Adam,
    AdamW,
    Descent,
    Global,
    Layerwise,
    Magnitude,
    Momentum,
    Nesterov,
    Optimiser,
    RandomSaliency,
    RMSProp,
    Sparsity,
    Structure,
)
from pyflux_prune.engines.base import ACTIVATIONS, Bool, Float, Int, Layer
from pyflux_prune.engines.torch import TorchEngine, TorchModel
from pyflux_prune.errors import InvalidInput

WIDTHS = (7, 6, 5, 3)
RULES = [
    Descent(0.1),
    Momentum(0.05, 0.9),
    Nesterov(0.05, 0.9),
    Nesterov(0.05, 0.0),
    RMSProp(0.003, 0.8, 1e-3),
    Adam(0.01, (0.8, 0.99), 1e-3),
    AdamW(0.01, (0.7, 0.98), 0.1, 1e-3),
]


def make_layers(widths: Sequence[int] = WIDTHS, activation: str = "tanh", bias: bool = True) -> list[Layer]:
    rng = np.random.default_rng(0)
    layers = []
    for place, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        weight = rng.normal(size=(outputs, inputs)).astype(np.float32)
        layers.append(
            Layer(
                name=str(2 * place),
                weight=weight,
                mask=np.ones(weight.shape, bool),
                bias=rng.normal(size=outputs).astype(np.float32) if bias else None,
                activation="identity" if place == len(widths) - 2 else activation,
            )
        )
    return layers


def with_weights(layers: Sequence[Layer], values: npt.NDArray[Any]) -> list[Layer]:
    """The layers with these values as weights, taken in the order layer, output, input."""
    parts = np.split(values.astype(np.float32), np.cumsum([layer.weight.size for layer in layers])[:-1])
    return [
        replace(layer, weight=part.reshape(layer.weight.shape)) for layer, part in zip(layers, parts, strict=True)
    ]


def make_data(samples: int = 40) -> tuple[Float, Int]:
    rng = np.random.default_rng(1)
    return rng.normal(size=(samples, WIDTHS[0])).astype(np.float32), rng.integers(0, WIDTHS[-1], samples)


def build(layers: Sequence[Layer]) -> TorchModel:
    return TorchEngine().build(layers)


def pruned_model(sparsity: Sparsity = 0.5, **options: Any) -> TorchModel:
    model = build(make_layers(**options))
    model.prune(Magnitude(), sparsity, Global())
    return model


def plant_nan(model: TorchModel) -> None:
    for layer in model.layers():
        layer.weight[~layer.mask] = np.nan


def arrays(model: TorchModel) -> list[Any]:
    return [np.array(a) for layer in model.layers() for a in (layer.weight, layer.mask, layer.bias)]


def assert_same(before: Sequence[Any], after: Sequence[Any]) -> None:
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def assert_close(actual: object, expected: object, rtol: float, atol: float = 0.0) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=atol)


def assert_pruned_are_zero(model: TorchModel) -> None:
    for layer in model.layers():
        assert not layer.weight[~layer.mask].any()


def flat_masks(model: TorchModel) -> Bool:
    return np.concatenate([layer.mask.ravel() for layer in model.layers()])


# --- layers, forward, gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_is_the_activated_masked_product(activation: str, bias: bool) -> None:
    model = pruned_model(activation=activation, bias=bias)
    x, _ = make_data()
    act: dict[str, Any] = {"relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}
    h = torch.from_numpy(x).double()
    for layer in model.layers():
        h = h @ torch.from_numpy(layer.weight * layer.mask).double().T
        h = h if layer.bias is None else h + torch.from_numpy(layer.bias)
        h = act.get(layer.activation, torch.clone)(h)
    outputs = model.forward(x)
    assert outputs.dtype == np.float32
    assert_close(outputs, h.numpy(), rtol=1e-5, atol=1e-5)


def test_build_copies_and_leaves_the_random_state_alone() -> None:
    layers = make_layers()
    state = torch.get_rng_state()
    model = build(layers)
    assert torch.equal(torch.get_rng_state(), state)
    before = arrays(model)
    for layer in layers:
        layer.weight[:] = 0
        layer.mask[:] = False
        assert layer.bias is not None
        layer.bias[:] = 0
    assert_same(before, arrays(model))


def test_build_takes_column_major_and_read_only_arrays() -> None:
    layers = make_layers()
    fortran = [
        replace(layer, weight=np.asfortranarray(layer.weight), mask=np.asfortranarray(layer.mask))
        for layer in layers
    ]
    for layer in fortran:
        layer.weight.flags.writeable = layer.mask.flags.writeable = False
    assert_same(arrays(build(layers)), arrays(build(fortran)))


def test_layers_are_named_views_of_the_memory_of_torch() -> None:
    model = build(make_layers())
    x, _ = make_data()
    views = model.layers()
    assert [layer.name for layer in views] == ["0", "2", "4"]
    assert [layer.activation for layer in views] == ["tanh", "tanh", "identity"]
    model.prune(Magnitude(), 0.5, Layerwise())
    assert [layer.mask.dtype for layer in views] == [np.dtype(bool)] * 3
    assert [int(layer.mask.sum()) for layer in views] == [21, 15, 7]
    for layer in views:
        layer.weight[:] = 0
        assert layer.bias is not None
        layer.bias[:] = 1
    np.testing.assert_array_equal(model.forward(x), np.ones((len(x), 3)))


def test_whatever_pruned_weights_hold_nothing_computed_changes() -> None:
    x, y = make_data()
    order = np.arange(len(y))
    clean, dirty = pruned_model(), pruned_model()
    for model in (clean, dirty):
        model.start(Adam())

    def results(model: TorchModel, spoil: bool) -> list[Any]:
        found: list[Any] = []
        for compute in (
            lambda: model.forward(x),
            lambda: model.evaluate(x, y),
            lambda: [g for pair in model.loss_and_gradients(x, y)[1] for g in pair],
            lambda: model.train(x, y, order, 8),
            lambda: model.scores(Magnitude()),
        ):
            if spoil:
                plant_nan(model)
            found.extend(compute())
        return found

    assert_same(results(clean, False), results(dirty, True))
    dirty.prune(Magnitude(), 0.6, Global())
    clean.prune(Magnitude(), 0.6, Global())
    assert_same(arrays(clean), arrays(dirty))


def test_nan_written_to_pruned_weights_is_gone_after_each_call() -> None:
    x, y = make_data()
    model = pruned_model()
    model.start(AdamW())
    for call in (
        lambda: model.forward(x),
        lambda: model.evaluate(x, y),
        lambda: model.loss_and_gradients(x, y),
        lambda: model.train(x, y, np.arange(len(y)), 8),
        lambda: model.train(x, y, np.arange(0), 8),
        lambda: model.scores(Magnitude()),
        lambda: model.prune(Magnitude(), 0.5, Global()),
    ):
        plant_nan(model)
        call()
        assert_pruned_are_zero(model)


def test_gradients_are_those_of_the_masked_product() -> None:
    model = pruned_model()
    x, y = make_data()
    weights = [torch.tensor(layer.weight, requires_grad=True) for layer in model.layers()]
    biases = [torch.tensor(layer.bias, requires_grad=True) for layer in model.layers()]
    h = torch.from_numpy(x)
    for layer, weight, bias in zip(model.layers(), weights, biases, strict=True):
        h = h @ (weight * torch.from_numpy(layer.mask)).T + bias
        h = h.tanh() if layer.activation == "tanh" else h
    expected = cross_entropy(h, torch.from_numpy(y))
    torch.autograd.backward(expected)

    loss, gradients = model.loss_and_gradients(x, y)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for layer, weight, bias, (in_weight, in_bias) in zip(model.layers(), weights, biases, gradients, strict=True):
        assert_close(in_weight, weight.grad, rtol=1e-4, atol=1e-6)
        assert_close(in_bias, bias.grad, rtol=1e-4, atol=1e-6)
        assert not in_weight[~layer.mask].any()


def test_gradients_of_a_layer_without_bias_have_none() -> None:
    _, gradients = build(make_layers(bias=False)).loss_and_gradients(*make_data())
    assert [in_bias for _, in_bias in gradients] == [None, None, None]


def test_evaluate_gives_the_mean_cross_entropy_and_the_accuracy() -> None:
    model = build(make_layers())
    x, y = make_data()
    outputs = model.forward(x).astype(np.float64)
    log_sum = np.log(np.exp(outputs).sum(1))
    loss, accuracy = model.evaluate(x, y)
    assert loss == pytest.approx((log_sum - outputs[np.arange(len(y)), y]).mean(), rel=1e-5)
    assert accuracy == (outputs.argmax(1) == y).mean()


def test_load_copies_in_place_and_zeroes_what_the_masks_prune() -> None:
    model, other = build(make_layers()), pruned_model()
    views = model.layers()
    plant_nan(other)
    for layer in other.layers():
        assert layer.bias is not None
        layer.bias[:] += 1
    model.load(other.layers())
    assert_pruned_are_zero(model)
    assert_same([layer.mask for layer in views], [layer.mask for layer in other.layers()])
    x, _ = make_data()
    np.testing.assert_array_equal(model.forward(x), other.forward(x))
    model.load(make_layers())
    assert_same(arrays(model), arrays(build(make_layers())))


def test_versions_tell_what_results_depend_on() -> None:
    versions = TorchEngine().versions()
    assert versions["torch"] == torch.__version__
    assert versions["numpy"] == np.__version__
    assert versions["threads"] == torch.get_num_threads()
    assert versions["blas"]


@pytest.mark.parametrize("module", ["engines.torch", "exchange"])
def test_without_torch_the_error_says_what_to_install(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; import pyflux_prune.{module}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert "EngineUnavailable: PyTorch cannot be imported" in run.stderr
    assert "pip install 'torch<2.14'" in run.stderr


# --- training --------------------------------------------------------------------------------------------


def optimisers_jl(rule: Optimiser, memory: dict[str, Tensor], w: Tensor, g: Tensor) -> Tensor:
    """The weights after one step, by the equations in Optimisers.jl's src/rules.jl."""
    m, v = memory.get("m", torch.zeros_like(w)), memory.get("v", torch.zeros_like(w))
    t = memory["t"] = memory.get("t", torch.tensor(0)) + 1
    match rule:
        case Descent(eta):
            return w - eta * g
        case Momentum(eta, rho):
            memory["m"] = rho * m + eta * g
            return w - memory["m"]
        case Nesterov(eta, rho):
            memory["m"] = rho * m - eta * g
            return w - (-(rho**2) * m + (1 + rho) * eta * g)
        case RMSProp(eta, rho, epsilon):
            memory["v"] = rho * v + (1 - rho) * g**2
            return w - eta * g / (memory["v"].sqrt() + epsilon)
        case Adam(eta, (b1, b2), epsilon) | AdamW(eta, (b1, b2), _, epsilon):
            m = memory["m"] = b1 * m + (1 - b1) * g
            v = memory["v"] = b2 * v + (1 - b2) * g**2
            step = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + epsilon)
            return w - eta * (step + rule.lambda_ * w if isinstance(rule, AdamW) else step)


def torch_optim(rule: Optimiser, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser that a PyTorch user would write."""
    match rule:
        case Descent(eta) | Nesterov(eta, 0.0):
            return torch.optim.SGD(parameters, eta)
        case Momentum(eta, rho):
            return torch.optim.SGD(parameters, eta, momentum=rho)
        case Nesterov(eta, rho):
            return torch.optim.SGD(parameters, eta, momentum=rho, nesterov=True)
        case RMSProp(eta, rho, epsilon):
            return torch.optim.RMSprop(parameters, eta, alpha=rho, eps=epsilon)
        case Adam(eta, beta, epsilon):
            return torch.optim.Adam(parameters, eta, betas=beta, eps=epsilon)
        case AdamW(eta, beta, lambda_, epsilon):
            return torch.optim.AdamW(parameters, eta, betas=beta, eps=epsilon, weight_decay=lambda_)


def train_pruning_half_way(rule: Optimiser) -> tuple[TorchModel, list[float]]:
    """Ten steps, prune half of the weights, ten steps: the model and the loss of each step."""
    x, y = make_data()
    order = np.arange(len(y))
    model = build(make_layers())
    model.start(rule)
    losses = [*model.train(x, y, order, 4)]
    model.prune(Magnitude(), 0.5, Global())
    assert_pruned_are_zero(model)
    losses += [*model.train(x, y, order, 4)]
    return model, losses


def plain_network() -> tuple[nn.Sequential, list[nn.Linear]]:
    module = nn.Sequential()
    for layer in make_layers():
        outputs, inputs = layer.weight.shape
        linear = nn.Linear(inputs, outputs)
        linear.weight.data, linear.bias.data = torch.tensor(layer.weight), torch.tensor(layer.bias)
        module.extend([linear, nn.Tanh()])
    del module[-1]
    return module, [part for part in module if isinstance(part, nn.Linear)]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_training_equals_the_equations_of_optimisers_jl_and_pruned_stays_zero(rule: Optimiser) -> None:
    model, losses = train_pruning_half_way(rule)
    assert_pruned_are_zero(model)

    x, y = map(torch.from_numpy, make_data())
    module, linears = plain_network()
    parameters = list(module.parameters())
    memories: list[dict[str, Tensor]] = [{} for _ in parameters]
    masks = [torch.ones(()) for _ in parameters]
    expected = []
    for step in range(20):
        if step == 10:
            masks[::2] = [torch.from_numpy(layer.mask) for layer in model.layers()]
            for parameter, memory, mask in zip(parameters, memories, masks, strict=True):
                parameter.data *= mask
                memory |= {key: memory[key] * mask for key in memory.keys() & {"m", "v"}}
        batch = slice(4 * (step % 10), 4 * (step % 10) + 4)
        loss = cross_entropy(module(x[batch]), y[batch])
        expected.append(loss.item())
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, memory, mask, g in zip(parameters, memories, masks, gradients, strict=True):
            parameter.data = optimisers_jl(rule, memory, parameter.detach(), g * mask)

    assert_close(losses, expected, rtol=1e-4)
    for layer, linear in zip(model.layers(), linears, strict=True):
        assert_close(layer.weight, linear.weight.detach(), rtol=1e-4, atol=1e-5)
        assert_close(layer.bias, linear.bias.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_training_equals_torch_optim_with_masked_gradients(rule: Optimiser) -> None:
    model, losses = train_pruning_half_way(rule)

    x, y = map(torch.from_numpy, make_data())
    module, linears = plain_network()
    optimiser = torch_optim(rule, list(module.parameters()))
    expected = []
    for step in range(20):
        masks = [torch.from_numpy(layer.mask) | (step < 10) for layer in model.layers()]
        for linear, mask in zip(linears, masks, strict=True):
            linear.weight.data *= mask
        batch = slice(4 * (step % 10), 4 * (step % 10) + 4)
        loss = cross_entropy(module(x[batch]), y[batch])
        expected.append(loss.item())
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        for linear, mask in zip(linears, masks, strict=True):
            assert linear.weight.grad is not None
            linear.weight.grad *= mask
        optimiser.step()

    assert_close(losses, expected, rtol=1e-6)
    for layer, linear in zip(model.layers(), linears, strict=True):
        trained = linear.weight.detach().numpy()
        assert_close(layer.weight[layer.mask], trained[layer.mask], rtol=1e-5, atol=1e-6)
        assert_close(layer.bias, linear.bias.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_pruning_empties_the_memory_of_pruned_weights_only(rule: Optimiser) -> None:
    x, y = make_data()
    model = build(make_layers())
    model.start(rule)
    model.train(x, y, np.arange(len(y)), 4)
    model.prune(Magnitude(), 0.5, Global())
    first = model.layers()[0]
    pruned, before = ~first.mask, first.weight.copy()
    first.mask[:] = True  # were there memory of what was pruned, it could act now

    model.train(np.zeros_like(x), y, np.arange(4), 4)  # no gradient in the first layer's weights
    assert not first.weight[pruned].any()
    moved = first.weight[~pruned] != before[~pruned]
    forgetful = rule == Nesterov(0.05, 0.0) or isinstance(rule, (Descent, RMSProp))
    assert not moved.any() if forgetful else moved.all()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_masks_loaded_while_the_optimiser_holds_memory_hold_too(rule: Optimiser) -> None:
    x, y = make_data()
    model = build(make_layers())
    model.start(rule)
    model.train(x, y, np.arange(len(y)), 4)
    model.load(pruned_model().layers())
    model.train(x, y, np.arange(len(y)), 4)
    assert_pruned_are_zero(model)


def test_start_empties_the_memory() -> None:
    x, y = make_data()
    model = build(make_layers())
    model.start(Momentum(0.1))
    model.train(x, y, np.arange(len(y)), 4)
    model.start(Momentum(0.1))
    before = model.layers()[0].weight.copy()
    model.train(np.zeros_like(x), y, np.arange(4), 4)
    np.testing.assert_array_equal(model.layers()[0].weight, before)


def test_training_follows_the_order_with_a_shorter_last_batch() -> None:
    x, y = make_data()
    order = np.random.default_rng(2).permutation(len(y))[:11]
    model, twin = build(make_layers()), build(make_layers())
    for each in (model, twin):
        each.start(Adam())
    losses = model.train(x, y, order, 4)
    assert losses.dtype == np.float32
    assert losses.shape == (3,)
    for step, batch in enumerate((order[:4], order[4:8], order[8:])):
        assert losses[step] == pytest.approx(twin.evaluate(x[batch], y[batch])[0], rel=1e-6)
        twin.train(x, y, batch, 4)
    assert_same(arrays(model), arrays(twin))


def test_training_on_nothing_takes_no_step() -> None:
    model = build(make_layers())
    before = arrays(model)
    model.start(Adam())
    assert model.train(*make_data(), np.arange(0), 4).shape == (0,)
    assert_same(before, arrays(model))


def test_training_before_start_is_refused() -> None:
    with pytest.raises(AssertionError, match="start comes before train"):
        build(make_layers()).train(*make_data(), np.arange(4), 4)


def test_ticks_rise_to_the_number_of_steps() -> None:
    x, y = make_data()
    model = build(make_layers())
    model.start(Descent())
    told: list[int] = []
    model.train(x, y, np.arange(len(y)), 1, told.append)
    assert told == sorted(set(told))
    assert told[-1] == len(y)


def test_an_interrupted_training_leaves_a_whole_network() -> None:
    x, y = make_data()
    model = pruned_model()
    model.start(Adam())

    def interrupt(steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.train(x, y, np.arange(4), 4, interrupt)
    assert_pruned_are_zero(model)
    assert np.isfinite(model.forward(x)).all()


def test_read_only_data_are_used_without_copy_or_warning() -> None:
    x, y = make_data()
    order = np.arange(len(y))
    for array in (x, y, order):
        array.flags.writeable = False
    model = build(make_layers())
    model.start(Descent())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train(x, y, order, 8)
        model.evaluate(x, y)
        model.loss_and_gradients(x, y)


# --- pruning ---------------------------------------------------------------------------------------------

sizes = st.lists(st.integers(1, 5), min_size=2, max_size=4)
two_sparsities = st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)).map(sorted)
structures = st.sampled_from([Global(), Layerwise()])


@st.composite
def distinct_layers(draw: st.DrawFn) -> list[Layer]:
    """Layers of weights that all differ in magnitude, where no rule for ties is needed."""
    layers = make_layers(draw(sizes))
    n = sum(layer.weight.size for layer in layers)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return with_weights(layers, (rng.permutation(n) + 1) / n * rng.choice([-1, 1], n))


@st.composite
def tied_layers(draw: st.DrawFn) -> list[Layer]:
    layers = make_layers(draw(sizes))
    n = sum(layer.weight.size for layer in layers)
    return with_weights(layers, np.array(draw(st.lists(st.integers(-2, 2), min_size=n, max_size=n))))


@settings(deadline=None, max_examples=40)
@given(layers=distinct_layers(), steps=two_sparsities)
def test_layerwise_masks_are_those_of_l1_unstructured(layers: list[Layer], steps: list[float]) -> None:
    model = build(layers)
    peers = [nn.Linear(*layer.weight.shape[::-1]) for layer in layers]
    gone = [0] * len(layers)
    for peer, layer in zip(peers, layers, strict=True):
        peer.weight.data = torch.tensor(layer.weight)
    for step, sparsity in enumerate(steps):
        model.prune(Magnitude(), sparsity, Layerwise())
        for i, peer in enumerate(peers):
            target = round(sparsity * layers[i].weight.size)
            amount = target - gone[i] if step else sparsity
            torch_prune.l1_unstructured(peer, "weight", amount)  # type: ignore[no-untyped-call]
            gone[i] = target
            np.testing.assert_array_equal(model.layers()[i].mask, peer.get_buffer("weight_mask").bool())


@settings(deadline=None, max_examples=40)
@given(layers=distinct_layers(), steps=two_sparsities)
def test_global_masks_are_those_of_global_unstructured(layers: list[Layer], steps: list[float]) -> None:
    model = build(layers)
    peers = [nn.Linear(*layer.weight.shape[::-1]) for layer in layers]
    for peer, layer in zip(peers, layers, strict=True):
        peer.weight.data = torch.tensor(layer.weight)
    n = sum(layer.weight.size for layer in layers)
    for step, sparsity in enumerate(steps):
        model.prune(Magnitude(), sparsity, Global())
        amount = round(sparsity * n) - round(steps[0] * n) if step else sparsity
        torch_prune.global_unstructured(
            [(peer, "weight") for peer in peers], torch_prune.L1Unstructured, amount=amount
        )
        for layer, peer in zip(model.layers(), peers, strict=True):
            np.testing.assert_array_equal(layer.mask, peer.get_buffer("weight_mask").bool())


@settings(deadline=None, max_examples=60)
@given(layers=tied_layers(), steps=two_sparsities, structure=structures)
def test_exactly_the_lowest_scores_go_and_ties_go_by_position(
    layers: list[Layer], steps: list[float], structure: Structure
) -> None:
    model = build(layers)
    group = np.repeat(range(len(layers)), [layer.weight.size for layer in layers])
    if structure == Global():
        group[:] = 0
    magnitude = np.concatenate([np.abs(layer.weight).ravel() for layer in layers])
    keep = np.ones(len(group), bool)
    for sparsity in steps:
        for g in set(group):
            members = [int(i) for i in np.flatnonzero(group == g)]
            pruned = round(sparsity * len(members)) - sum(not keep[i] for i in members)
            lowest = sorted((i for i in members if keep[i]), key=lambda i: (magnitude[i], i))
            keep[lowest[:pruned]] = False
        model.prune(Magnitude(), sparsity, structure)
        np.testing.assert_array_equal(flat_masks(model), keep)
        assert_pruned_are_zero(model)
        before = arrays(model)
        model.prune(Magnitude(), sparsity, structure)
        assert_same(before, arrays(model))


def test_equal_weights_are_pruned_by_layer_then_output_then_input() -> None:
    layers = make_layers((3, 2, 2))
    model = build(with_weights(layers, np.ones(10)))
    for pruned in range(10):
        model.prune(Magnitude(), pruned / 10, Global())
        np.testing.assert_array_equal(flat_masks(model), np.arange(10) >= pruned)


@pytest.mark.parametrize(("sparsity", "pruned"), [(0.05, 0), (0.15, 2), (0.25, 2), (0.35, 4), (0.349, 3)])
def test_the_count_rounds_half_to_even(sparsity: float, pruned: int) -> None:
    model = build(make_layers((5, 2)))
    model.prune(Magnitude(), sparsity, Global())
    assert np.sum(~flat_masks(model)) == pruned


def test_layerwise_takes_one_sparsity_per_layer() -> None:
    model = build(make_layers())
    model.prune(Magnitude(), (0.5, 0.0, 0.8), Layerwise())
    assert [int((~layer.mask).sum()) for layer in model.layers()] == [21, 0, 12]


def test_kept_weights_keep_their_values() -> None:
    model = pruned_model(0.7)
    for layer, before in zip(model.layers(), make_layers(), strict=True):
        np.testing.assert_array_equal(layer.weight, np.where(layer.mask, before.weight, 0))
        np.testing.assert_array_equal(layer.bias, before.bias)


def test_magnitude_scores_are_absolute_weights() -> None:
    model = build(make_layers())
    before = arrays(model)
    for values, layer in zip(model.scores(Magnitude()), model.layers(), strict=True):
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, np.abs(layer.weight))
        values[:] = -1  # a copy
    assert_same(before, arrays(model))


def test_random_scores_depend_on_the_seed_alone() -> None:
    model, other = build(make_layers()), build(make_layers(activation="relu", bias=False))
    torch.manual_seed(5)
    first = model.scores(RandomSaliency(3))
    torch.manual_seed(6)
    assert_same(first, other.scores(RandomSaliency(3)))
    assert [values.shape for values in first] == [layer.weight.shape for layer in model.layers()]
    assert all(values.dtype == np.float32 and (values >= 0).all() and (values < 1).all() for values in first)
    assert not np.array_equal(first[0], model.scores(RandomSaliency(4))[0])
    assert not np.array_equal(first[0].ravel()[:30], first[1].ravel())


def test_random_pruning_with_one_seed_nests() -> None:
    step, leap = build(make_layers()), build(make_layers())
    step.prune(RandomSaliency(3), 0.3, Global())
    step.prune(RandomSaliency(3), 0.8, Global())
    leap.prune(RandomSaliency(3), 0.8, Global())
    assert_same(arrays(step), arrays(leap))


def spoil_last_layer(model: TorchModel) -> None:
    last = model.layers()[-1]
    last.weight[np.unravel_index(np.argmax(last.mask), last.mask.shape)] = np.nan


@pytest.mark.parametrize(
    ("sparsity", "structure", "spoil", "message"),
    [
        ((0.6, 0.6, 0.6), Global(), None, r"sparsity must be one number .* not \(0\.6, 0\.6, 0\.6\)"),
        ((0.6, 0.6), Layerwise(), None, "one number or one per layer, 3 here, not 2 numbers"),
        (0.3, Global(), None, "0.3 of the network means 26 of 87 weights pruned, but 44 are already"),
        ((0.9, 0.9, 0.1), Layerwise(), None, "0.1 of layer 4 means 2 of 15 weights pruned, but"),
        (0.9, Global(), spoil_last_layer, "layer 4 cannot be pruned: scores of its weights are NaN"),
        ((0.9, 0.9, 0.9), Layerwise(), spoil_last_layer, "layer 4 cannot be pruned"),
    ],
)
def test_pruning_that_cannot_be_done_says_why_and_changes_nothing(
    sparsity: Sparsity, structure: Structure, spoil: Any, message: str
) -> None:
    model = pruned_model(0.5)
    if spoil:
        spoil(model)
    before = arrays(model)
    with pytest.raises(InvalidInput, match=message):
        model.prune(Magnitude(), sparsity, structure)
    assert_same(before, arrays(model))


def test_a_failed_pruning_leaves_the_training_as_it_was() -> None:
    x, y = make_data()
    order = np.arange(len(y))
    model, twin = pruned_model(), pruned_model()
    for each in (model, twin):
        each.start(Adam())
        each.train(x, y, order, 4)
    with pytest.raises(InvalidInput, match="the network"):
        model.prune(Magnitude(), 0.1, Global())
    assert_same([model.train(x, y, order, 4), *arrays(model)], [twin.train(x, y, order, 4), *arrays(twin)])


def test_nan_where_weights_are_pruned_is_no_obstacle() -> None:
    model = pruned_model(0.5)
    plant_nan(model)
    model.prune(Magnitude(), 0.8, Global())
    assert_same(arrays(model), arrays(pruned_model(0.8)))


def test_infinite_weights_go_last() -> None:
    model = build(make_layers())
    model.layers()[0].weight[0, 0] = -np.inf
    model.prune(Magnitude(), 0.98, Global())
    assert model.layers()[0].mask[0, 0]


def test_an_unknown_saliency_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"saliency must be .* not 'weightiest'"):
        build(make_layers()).scores("weightiest")  # type: ignore[arg-type]
