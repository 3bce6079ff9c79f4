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
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
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
    with_weights,
)

from pyflux_prune.choices import (
    SET,
    Adam,
    AdamW,
    Descent,
    Global,
    Layerwise,
    Magnitude,
    Momentum,
    Nesterov,
    Optimiser,
    Regrowth,
    RigL,
    RMSProp,
)
from pyflux_prune.engines.parts import ACTIVATIONS, Layer
from pyflux_prune.engines.torch import TorchEngine, TorchModel
from pyflux_prune.errors import InvalidInput

pytestmark = pytest.mark.filterwarnings("ignore::pyflux_prune.errors.LayerCollapse")

RULES = [
    Descent(0.1),
    Momentum(0.05, 0.9),
    Nesterov(0.05, 0.9),
    Nesterov(0.05, 0.0),
    RMSProp(0.003, 0.8, 1e-3),
    Adam(0.01, (0.8, 0.99), 1e-3),
    AdamW(0.01, (0.7, 0.98), 0.1, 1e-3),
]


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


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_new_learning_rate_acts_as_in_the_equations_of_optimisers_jl(rule: Optimiser) -> None:
    x, y = map(torch.from_numpy, make_data())
    model = build(make_layers())
    model.start(rule)
    module, linears = plain_network()
    memories: list[dict[str, Tensor]] = [{} for _ in module.parameters()]
    for step in range(12):
        eta = rule.eta * (1, 0.1, 0.5, 1.2)[step // 3]
        model.adjust(eta)
        batch = np.arange(3 * step, 3 * step + 3)
        model.train(x.numpy(), y.numpy(), batch, 3)
        loss = cross_entropy(module(x[batch]), y[batch])
        for parameter, memory, g in zip(
            module.parameters(), memories, torch.autograd.grad(loss, list(module.parameters())), strict=True
        ):
            parameter.data = optimisers_jl(replace(rule, eta=eta), memory, parameter.detach(), g)
    for layer, linear in zip(model.layers(), linears, strict=True):
        assert_close(layer.weight, linear.weight.detach(), rtol=1e-4, atol=1e-5)
        assert_close(layer.bias, linear.bias.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_same_learning_rate_again_changes_nothing(rule: Optimiser) -> None:
    x, y = make_data()
    model, twin = build(make_layers()), build(make_layers())
    for each in (model, twin):
        each.start(rule)
    for start in range(0, 40, 8):
        model.adjust(rule.eta)
        for each in (model, twin):
            each.train(x, y, np.arange(start, start + 8), 4)
    assert_same(arrays(model), arrays(twin))


def test_a_learning_rate_far_below_the_first_does_not_overflow() -> None:
    x, y = make_data()
    model = build(make_layers())
    model.start(Momentum(0.1, 0.9))
    for epoch in range(60):
        model.adjust(0.1 * 0.1**epoch)
        model.train(x, y, np.arange(len(y)), len(y))
    assert all(np.isfinite(a).all() for a in arrays(model))


def test_adjusting_before_start_is_refused() -> None:
    with pytest.raises(AssertionError, match="start comes before adjust"):
        build(make_layers()).adjust(0.1)


# --- regrowth --------------------------------------------------------------------------------------------


def dense_gradients(model: TorchModel) -> list[Tensor]:
    """Of the mean cross-entropy, in all weights, pruned or not, in float64."""
    x, y = map(torch.from_numpy, make_data())
    weights = [torch.tensor(layer.weight, dtype=torch.float64, requires_grad=True) for layer in model.layers()]
    h = x.double()
    for layer, weight in zip(model.layers(), weights, strict=True):
        h = h @ weight.T + torch.from_numpy(layer.bias)
        h = h if layer.activation == "identity" else h.tanh()
    return list(torch.autograd.grad(cross_entropy(h, y), weights))


@pytest.mark.parametrize("method", [RigL(), SET(seed=3)], ids=str)
@pytest.mark.parametrize(("sparsity", "fraction"), [(0.5, 0.3), (0.8, 0.25), (0.1, 0.9), (0.5, 0.01)])
def test_the_smallest_weights_give_way_to_as_many_that_begin_at_0(
    method: Regrowth, sparsity: float, fraction: float
) -> None:
    model = pruned_model(sparsity)
    before = [replace(la, weight=la.weight.copy(), mask=la.mask.copy()) for la in model.layers()]
    gradients = dense_gradients(model)
    model.regrow(method, fraction, make_data())
    for old, new, g in zip(before, model.layers(), gradients, strict=True):
        gone, grown = old.mask & ~new.mask, new.mask & ~old.mask
        count = min(round(fraction * old.mask.sum()), int((~old.mask).sum()))
        assert gone.sum() == grown.sum() == count
        stays = old.mask & new.mask
        assert count in (0, old.mask.sum()) or abs(old.weight)[gone].max() <= abs(old.weight)[stays].min()
        np.testing.assert_array_equal(new.weight, np.where(stays, old.weight, 0))
        idle = ~old.mask & ~new.mask
        if isinstance(method, RigL) and count and idle.any():
            assert abs(g.numpy())[grown].min() >= abs(g.numpy())[idle].max()


def test_ties_of_regrowth_go_by_position() -> None:
    layers = [
        replace(la, mask=np.arange(la.mask.size).reshape(la.mask.shape) % 2 == 1) for la in make_layers((6, 4))
    ]
    model = build(with_weights(layers, np.ones(24)))
    x, y = make_data()
    model.regrow(RigL(), 0.25, (np.zeros_like(x[:, :6]), y))  # no gradient in any weight
    assert flat_masks(model).nonzero()[0].tolist() == [0, 2, 4, 7, 9, 11, 13, 15, 17, 19, 21, 23]


def test_random_growth_depends_on_the_seed_alone() -> None:
    masks = []
    for seed in (3, 3, 4):
        model = pruned_model()
        model.regrow(SET(seed=seed), 0.5, make_data())
        masks.append(flat_masks(model))
        torch.rand(1)
    np.testing.assert_array_equal(masks[0], masks[1])
    assert (masks[0] != masks[2]).any()


@pytest.mark.parametrize("method", [RigL(), SET()], ids=str)
def test_regrowth_has_nothing_to_do_in_a_dense_network(method: Regrowth) -> None:
    model = build(make_layers())
    before = arrays(model)
    model.regrow(method, 0.5, make_data())
    assert_same(before, arrays(model))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_neither_what_grows_nor_what_gives_way_has_memory(rule: Optimiser) -> None:
    x, y = make_data()
    model = build(make_layers())
    model.start(rule)
    model.train(x, y, np.arange(len(y)), 4)
    model.load(pruned_model().layers())  # masks, but not the memory
    first = model.layers()[0]
    before = first.mask.copy()
    model.regrow(RigL(), 0.3, (x, y))
    changed = first.mask != before
    assert changed.any()
    first.mask[changed] = True
    model.train(np.zeros_like(x), y, np.arange(8), 4)  # no gradient in the first layer's weights
    assert not first.weight[changed].any()


def test_what_grows_is_trained() -> None:
    x, y = make_data()
    model = pruned_model()
    before = [la.mask.copy() for la in model.layers()]
    model.start(Adam(0.01))
    model.regrow(RigL(), 0.3, (x, y))
    model.train(x, y, np.arange(len(y)), 4)
    for old, layer in zip(before, model.layers(), strict=True):
        assert (layer.weight[layer.mask & ~old] != 0).all()
    assert_pruned_are_zero(model)


def test_regrowth_by_nan_is_refused_and_changes_nothing() -> None:
    model = pruned_model()
    last = model.layers()[-1]
    last.weight[np.unravel_index(np.argmax(last.mask), last.mask.shape)] = np.nan
    before = arrays(model)
    with pytest.raises(InvalidInput, match="layer 4 cannot be regrown"):
        model.regrow(SET(), 0.3, make_data())
    with pytest.raises(InvalidInput, match="cannot be regrown"):
        model.regrow(RigL(), 0.3, make_data())
    assert_same(before, arrays(model))


def test_an_unknown_regrowth_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"regrowth must be .* not 'weeds'"):
        pruned_model().regrow("weeds", 0.3, make_data())  # type: ignore[arg-type]


# --- compact networks ------------------------------------------------------------------------------------


def masked(layers: Sequence[Layer], *masks: object) -> TorchModel:
    return build([replace(la, mask=np.array(mask, bool)) for la, mask in zip(layers, masks, strict=True)])


def shapes(model: TorchModel) -> list[tuple[int, ...]]:
    return [layer.mask.shape for layer in model.layers()]


@settings(deadline=None, max_examples=150)
@given(
    widths=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
)
def test_a_compact_network_gives_the_same_and_every_neuron_counts(
    widths: list[int], density: float, seed: int, activation: str, bias: bool
) -> None:
    rng = np.random.default_rng(seed)
    layers = [
        replace(la, mask=rng.random(la.mask.shape) < density)
        for la in make_layers(widths, activation=activation, bias=bias)
    ]
    model = build(layers)
    before, x = arrays(model), rng.normal(size=(9, widths[0])).astype(np.float32)
    small = model.compact()
    assert_close(small.forward(x), model.forward(x), rtol=1e-4, atol=1e-5)
    assert_same(before, arrays(model))
    assert shapes(small)[0][1] == widths[0]
    assert shapes(small)[-1][0] == widths[-1]
    for here, after in itertools.pairwise(small.layers()):
        alive = here.mask.any(1) & after.mask.any(0)
        assert alive.all() or len(alive) == 1
    again = small.compact()
    assert shapes(again) == shapes(small)
    assert_same(arrays(again), arrays(small))


def test_a_dense_network_is_compact() -> None:
    model = build(make_layers())
    assert_same(arrays(model.compact()), arrays(model))
    alone = pruned_model(widths=(7, 4))
    assert_same(arrays(alone.compact()), arrays(alone))


def test_neurons_without_inputs_become_biases_of_the_next_layer() -> None:
    layers = make_layers((2, 3, 2), activation="tanh")
    model = masked(layers, [[1, 1], [0, 0], [1, 0]], np.ones((2, 3)))
    small = model.compact()
    first, last = small.layers()
    np.testing.assert_array_equal(first.weight, model.layers()[0].weight[[0, 2]])
    np.testing.assert_array_equal(first.mask, [[True, True], [True, False]])
    np.testing.assert_array_equal(last.weight, layers[1].weight[:, [0, 2]])
    assert layers[0].bias is not None
    assert layers[1].bias is not None
    expected = layers[1].bias + layers[1].weight[:, 1] * np.tanh(layers[0].bias[1])
    assert_close(last.bias, expected, rtol=1e-6)


def test_a_neuron_fed_by_constants_alone_is_a_constant_too() -> None:
    layers = make_layers((2, 2, 2, 1), activation="sigmoid")
    model = masked(layers, [[1, 1], [0, 0]], [[1, 1], [0, 1]], [[1, 1]])
    small = model.compact()
    assert shapes(small) == [(1, 2), (1, 1), (1, 1)]
    b, w = [la.bias for la in layers], [la.weight for la in layers]
    inner = 1 / (1 + np.exp(-b[0][1]))
    outer = 1 / (1 + np.exp(-b[1][1] - w[1][1, 1] * inner))
    assert_close(small.layers()[1].bias, b[1][:1] + w[1][0, 1] * inner, rtol=1e-6)
    assert_close(small.layers()[2].bias, b[2] + w[2][0, 1] * outer, rtol=1e-6)


def test_neurons_without_outputs_go_and_those_that_only_they_used() -> None:
    layers = make_layers((2, 2, 2, 1))
    model = masked(layers, np.ones((2, 2)), [[1, 0], [0, 1]], [[1, 0]])
    small = model.compact()
    assert shapes(small) == [(1, 2), (1, 1), (1, 1)]
    assert_same(arrays(small)[1::3], [np.ones(shape) for shape in shapes(small)])
    assert_same([small.layers()[0].bias, small.layers()[1].bias], [layers[0].bias[:1], layers[1].bias[:1]])


@pytest.mark.parametrize(("activation", "gets"), [("sigmoid", True), ("tanh", False)])
def test_a_layer_gets_a_bias_where_a_constant_asks_for_it(activation: str, gets: bool) -> None:
    layers = make_layers((2, 2, 3), activation=activation, bias=False)
    small = masked(layers, [[1, 1], [0, 0]], np.ones((3, 2))).compact()
    assert [la.bias is not None for la in small.layers()] == [False, gets]
    if gets:
        assert_close(small.layers()[1].bias, layers[1].weight[:, 1] / 2, rtol=1e-6)


def test_one_neuron_of_a_collapsed_layer_stays() -> None:
    layers = make_layers((3, 4, 4, 2))
    x = make_data()[0][:, :3].copy()
    for place in range(3):
        masks = [np.full(la.mask.shape, i != place) for i, la in enumerate(layers)]
        model = masked(layers, *masks)
        small = model.compact()
        assert 1 in [len(la.weight) for la in small.layers()[:-1]]
        if place < 2:  # the first
            np.testing.assert_array_equal(small.layers()[place].bias, layers[place].bias[:1])
        assert_close(small.forward(x), model.forward(x), rtol=1e-5, atol=1e-6)


def test_a_compact_network_is_one_of_its_own_that_can_be_trained() -> None:
    x, y = make_data()
    model = pruned_model(0.8)
    model.start(Adam())
    before = arrays(model)
    small = model.compact()
    small.start(Adam())
    losses = small.train(x, y, np.arange(len(y)), 4)
    assert np.isfinite(losses).all()
    assert_same(before, arrays(model))
    small.prune(Magnitude(), 0.9, Global())
    assert_pruned_are_zero(small)
