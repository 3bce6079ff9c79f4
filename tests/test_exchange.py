"""Between PyTorch and lists of layers: nothing is lost, and what cannot be taken over is named."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from any_networks import assert_same, networks, samples
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from pyflux_prune.engines.parts import (
    ACTIVATIONS,
    BatchNorm,
    ConvLayer,
    Flatten,
    Float,
    Input,
    Layer,
    Part,
    Pool,
    copies,
    input_shape,
)
from pyflux_prune.engines.torch import TorchEngine
from pyflux_prune.errors import InvalidInput
from pyflux_prune.exchange import (
    layers_from_state_dict,
    module_from_parts,
    parts_from_module,
    state_dict_from_parts,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make_module(activation: type[nn.Module] = nn.Tanh, bias: bool = True) -> nn.Sequential:
    first, second, last = (nn.Linear(n, m, bias=bias) for n, m in ((7, 6), (6, 5), (5, 3)))
    return nn.Sequential(first, activation(), second, activation(), last)


def make_pruned_module() -> nn.Sequential:
    """The first layer pruned twice, the last by whole neurons, the second not at all."""
    module = make_module()
    prune.l1_unstructured(module[0], "weight", 0.3)  # type: ignore[no-untyped-call]
    prune.l1_unstructured(module[0], "weight", 0.5)  # type: ignore[no-untyped-call]
    prune.ln_structured(module[4], "weight", 1, n=2, dim=0)  # type: ignore[no-untyped-call]
    return module


def make_input() -> Tensor:
    return torch.randn(11, 7)


def outputs(layers: Sequence[Layer], x: Tensor) -> Float:
    return TorchEngine().build(layers).forward(x.numpy())


def outputs_of(module: nn.Module, x: Tensor) -> Any:
    return module(x).detach().numpy()


def assert_same_layers(some: Sequence[Layer], others: Sequence[Layer]) -> None:
    for one, other in zip(some, others, strict=True):
        assert (one.name, one.activation) == (other.name, other.activation)
        for a, b in ((one.weight, other.weight), (one.mask, other.mask), (one.bias, other.bias)):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype
        assert torch.equal(tensor, other[key]), key


# --- what is taken over ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("module_type", "name"),
    [(nn.ReLU, "relu"), (nn.Tanh, "tanh"), (nn.Sigmoid, "sigmoid"), (nn.Identity, "identity")],
)
def test_a_plain_module_computes_the_same_as_its_layers(
    module_type: type[nn.Module], name: str, bias: bool
) -> None:
    module, x = make_module(module_type, bias), make_input()
    layers = parts_from_module(module)
    assert [layer.activation for layer in layers] == [name, name, "identity"]
    assert [layer.name for layer in layers] == (["0", "1", "2"] if name == "identity" else ["0", "2", "4"])
    assert all(layer.mask.all() and layer.mask.dtype == bool for layer in layers)
    assert all((layer.bias is not None) == bias for layer in layers)
    np.testing.assert_array_equal(outputs(layers, x), outputs_of(module, x))


@pytest.mark.parametrize("bias", [True, False])
def test_a_plain_module_comes_back_the_same(bias: bool) -> None:
    module, x = make_module(bias=bias), make_input()
    back = module_from_parts(parts_from_module(module))
    assert str(back) == str(module)
    assert_same_state(back.state_dict(), module.state_dict())
    np.testing.assert_array_equal(outputs_of(back, x), outputs_of(module, x))


def test_a_pruned_module_gives_weight_times_mask_and_the_mask() -> None:
    module, x = make_pruned_module(), make_input()
    layers = parts_from_module(module)
    for layer, i in zip(layers, (0, 2, 4), strict=True):
        np.testing.assert_array_equal(layer.weight, torch.as_tensor(module[i].weight).detach())
    assert [int((~layer.mask).sum()) for layer in layers] == [27, 0, 5]
    np.testing.assert_array_equal(outputs(layers, x), outputs_of(module, x))


def test_a_pruned_module_comes_back_pruned_where_it_was() -> None:
    module, x = make_pruned_module(), make_input()
    back = module_from_parts(parts_from_module(module))
    assert [prune.is_pruned(back[i]) for i in (0, 2, 4)] == [True, False, True]
    assert back.state_dict().keys() == module.state_dict().keys()
    for i in (0, 4):
        assert torch.equal(back[i].get_buffer("weight_mask"), module[i].get_buffer("weight_mask"))
        assert torch.equal(
            back[i].get_parameter("weight_orig"),
            module[i].get_parameter("weight_orig") * module[i].get_buffer("weight_mask"),
        )
    assert_same_layers(parts_from_module(back), parts_from_module(module))
    np.testing.assert_array_equal(outputs_of(back, x), outputs_of(module, x))


def test_a_module_that_comes_back_can_be_pruned_further_and_made_permanent_by_torch() -> None:
    back = module_from_parts(parts_from_module(make_pruned_module()))
    prune.l1_unstructured(back[0], "weight", 5)  # type: ignore[no-untyped-call]
    prune.remove(back[0], "weight")  # type: ignore[no-untyped-call]
    assert int((back[0].get_parameter("weight") == 0).sum()) == 27 + 5


def test_modules_pruned_by_the_reference_engine_can_be_taken_over() -> None:
    model = TorchEngine().build(parts_from_module(make_pruned_module()))
    assert_same_layers(parts_from_module(model.module), model.layers())


def test_nested_sequentials_shared_activations_and_identities_are_flattened() -> None:
    act = nn.ReLU(inplace=True)

    class Head(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 4), act, nn.Identity(), nn.Linear(4, 2))

    module = nn.Sequential(
        OrderedDict(first=nn.Sequential(nn.Identity(), nn.Linear(7, 4), act), second=nn.Sequential(Head()))
    )
    layers, x = parts_from_module(module), make_input()
    assert [layer.name for layer in layers] == ["0", "2", "4"]
    assert [layer.activation for layer in layers] == ["relu", "relu", "identity"]
    np.testing.assert_array_equal(outputs(layers, x), outputs_of(module, x))


def test_a_layer_used_twice_becomes_two() -> None:
    linear = nn.Linear(7, 7)
    module, x = nn.Sequential(linear, nn.Tanh(), linear), make_input()
    first, second = parts_from_module(module)
    assert not np.shares_memory(first.weight, second.weight)
    np.testing.assert_array_equal(outputs([first, second], x), outputs_of(module, x))


def test_a_lone_linear_is_one_layer() -> None:
    linear, x = nn.Linear(7, 2), make_input()
    np.testing.assert_array_equal(outputs(parts_from_module(linear), x), outputs_of(linear, x))


def test_a_nan_that_is_pruned_is_dropped() -> None:
    module = make_pruned_module()
    before = parts_from_module(module)
    module[0].get_parameter("weight_orig").data[torch.from_numpy(~before[0].mask)] = torch.nan
    assert_same_layers(parts_from_module(module), before)


@pytest.mark.parametrize("make", [make_module, make_pruned_module])
def test_nothing_is_shared_with_the_module_taken_over(make: Callable[[], nn.Sequential]) -> None:
    module = make()
    layers = parts_from_module(module)
    before = parts_from_module(module_from_parts(layers))
    for tensor in module.state_dict().values():
        tensor.zero_()
    assert_same_layers(layers, before)


@pytest.mark.parametrize("make", [make_module, make_pruned_module])
def test_training_the_module_made_leaves_the_layers_alone(make: Callable[[], nn.Sequential]) -> None:
    layers = parts_from_module(make())
    module, before = module_from_parts(layers), parts_from_module(module_from_parts(layers))
    optimiser = torch.optim.SGD(module.parameters(), 0.1)
    module(make_input()).sum().backward()
    optimiser.step()
    assert_same_layers(layers, before)
    assert not np.array_equal(parts_from_module(module)[0].weight, before[0].weight)


def test_making_a_module_leaves_the_random_state_alone() -> None:
    layers = parts_from_module(make_module())
    state = torch.get_rng_state()
    module_from_parts(layers)
    assert torch.equal(torch.get_rng_state(), state)


# --- state dicts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_module, make_pruned_module])
def test_a_state_dict_gives_the_layers_of_its_module(make: Callable[[], nn.Sequential]) -> None:
    module = make()
    assert_same_layers(layers_from_state_dict(module.state_dict(), activation="tanh"), parts_from_module(module))


@pytest.mark.parametrize("make", [make_module, make_pruned_module])
def test_a_state_dict_made_loads_into_a_module_of_the_same_kind(make: Callable[[], nn.Sequential]) -> None:
    module, x = make(), make_input()
    expected = outputs_of(module, x)
    state = state_dict_from_parts(parts_from_module(module))
    assert state.keys() == module.state_dict().keys()
    for parameter in module.parameters():
        parameter.data.zero_()
    module.load_state_dict(state)
    np.testing.assert_array_equal(outputs_of(module, x), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activation_of_a_state_dict_lies_between_its_layers(activation: str) -> None:
    layers = layers_from_state_dict(make_module().state_dict(), activation=activation)
    assert [layer.activation for layer in layers] == [activation, activation, "identity"]


def test_a_state_dict_is_read_in_the_order_of_its_numbers() -> None:
    widths = range(3, 15)
    linears = {2 * i: nn.Linear(n, n + 1) for i, n in enumerate(widths)}
    state = {f"{i}.{k}": t for i in reversed(linears) for k, t in linears[i].state_dict().items()}
    layers = layers_from_state_dict(state, activation="relu")
    assert [layer.weight.shape for layer in layers] == [(n + 1, n) for n in widths]
    assert [layer.name for layer in layers] == [str(2 * i) for i in range(len(widths))]


def test_the_state_dict_of_nested_sequentials_is_read() -> None:
    module = nn.Sequential(nn.Sequential(nn.Linear(7, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 2)))
    assert_same_layers(layers_from_state_dict(module.state_dict(), activation="relu"), parts_from_module(module))


# --- what is refused -------------------------------------------------------------------------------------


class Doubled(nn.Sequential):
    """A Sequential that does not compute what one does."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def spoiled(change: Callable[[nn.Sequential], object]) -> nn.Sequential:
    module = make_module()
    change(module)
    return module


def set_one(name: str, value: float) -> Callable[[nn.Sequential], object]:
    return lambda module: module.get_parameter(name).data[1].fill_(value)


REFUSED_MODULES: dict[str, tuple[Any, str]] = {
    "dropout": (nn.Sequential(nn.Linear(2, 2), nn.Dropout()), r"module\[1\] is Dropout, but only"),
    "nested": (nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.GELU())), r"module\[0\]\[1\] is GELU"),
    "own forward": (nn.Sequential(Doubled(nn.Linear(2, 2))), r"module\[0\] is Doubled"),
    "lazy": (nn.Sequential(nn.LazyLinear(2)), r"module\[0\] is LazyLinear"),
    "not a module": ("net.pt", "module is str"),
    "empty": (nn.Sequential(), "at least one Linear"),
    "no linear": (nn.Sequential(nn.Identity()), "at least one Linear"),
    "leading activation": (nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), r"module\[0\] is ReLU, .* follow"),
    "two activations": (nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Tanh()), r"module\[2\] is Tanh, but"),
    "widths": (nn.Sequential(nn.Linear(2, 3), nn.Linear(4, 2)), r"module\[1\] takes 4 inputs, .* gives 3"),
    "float64": (make_module().double(), r"module\[0\]\.weight must be float32, not .*float64.*\.float\(\)"),
    "float16": (make_module().half(), r"module\[0\]\.weight must be float32, not torch\.float16"),
    "meta": (nn.Linear(2, 2, device="meta"), r"module\.weight must be a dense tensor, not .* on meta"),
    "nan": (spoiled(set_one("2.weight", torch.nan)), r"module\[2\]\.weight must be finite"),
    "infinity": (spoiled(set_one("2.weight", -torch.inf)), r"module\[2\]\.weight must be finite"),
    "nan bias": (spoiled(set_one("0.bias", torch.nan)), r"module\[0\]\.bias must be finite"),
    "pruned bias": (
        spoiled(lambda m: prune.l1_unstructured(m[0], "bias", 2)),  # type: ignore[no-untyped-call]
        r"module\[0\] has a pruned bias: undo it with torch\.nn\.utils\.prune\.remove",
    ),
    "weight norm": (
        spoiled(lambda m: parametrizations.weight_norm(m[0])),
        r"module\[0\] is ParametrizedLinear",
    ),
    "old spectral norm": (
        spoiled(lambda m: nn.utils.spectral_norm(m[0])),
        r"module\[0\] must hold weight, or weight_orig and weight_mask, .* not bias, weight_orig, weight_u",
    ),
}


@pytest.mark.parametrize("case", REFUSED_MODULES)
def test_a_module_that_cannot_be_taken_over_is_refused_by_place_and_kind(case: str) -> None:
    module, message = REFUSED_MODULES[case]
    with pytest.raises(InvalidInput, match=message):
        parts_from_module(module)


REFUSED_STATES: dict[str, tuple[dict[Any, Any], str]] = {
    "empty": ({}, "at least one Linear"),
    "names": ({"fc1.weight": torch.ones(2, 2)}, r"'0\.weight'.* not 'fc1\.weight'"),
    "number": ({0: torch.ones(2, 2)}, "not 0"),
    "bare": ({"weight": torch.ones(2, 2)}, "not 'weight'"),
    "batch norm": (
        {"0.weight": torch.ones(2, 2), "1.weight": torch.ones(2), "1.running_mean": torch.ones(2)},
        "layer 1 must hold weight, .* not running_mean, weight",
    ),
    "no weight": ({"0.bias": torch.ones(2)}, "layer 0 must hold weight, .* not bias"),
    "no mask": ({"0.weight_orig": torch.ones(2, 2)}, "layer 0 must hold weight, .* not weight_orig"),
    "pruned bias": (
        {"0.weight": torch.ones(2, 2), "0.bias_orig": torch.ones(2), "0.bias_mask": torch.ones(2)},
        "layer 0 has a pruned bias",
    ),
    "array": ({"0.weight": np.ones((2, 2), np.float32)}, r"layer 0\.weight must be a tensor, not ndarray"),
    "whole numbers": ({"0.weight": torch.ones(2, 2, dtype=torch.int64)}, "must be float32, not torch.int64"),
    "sparse": ({"0.weight": torch.ones(2, 2).to_sparse()}, r"must be a dense tensor, not torch\.sparse_coo"),
    "no matrix": ({"0.weight": torch.ones(2, 2, 3)}, r"layer 0 must have a weight .* not \[\(2, 2, 3\), "),
    "nothing in it": ({"0.weight": torch.ones(2, 0)}, r"layer 0 must have a weight .* not \[\(2, 0\)"),
    "mask shape": (
        {"0.weight_orig": torch.ones(2, 3), "0.weight_mask": torch.ones(3, 2)},
        r"layer 0 must have a weight .* not \[\(2, 3\), \(3, 2\)\]",
    ),
    "bias shape": (
        {"0.weight": torch.ones(2, 3), "0.bias": torch.ones(3)},
        r"layer 0 must have a weight .* not \[\(2, 3\), \(2, 3\), \(3,\)\]",
    ),
    "widths": ({"0.weight": torch.ones(2, 3), "1.1.weight": torch.ones(2, 3)}, r"layer 1\.1 takes 3 inputs"),
    "nan": ({"0.weight": torch.full((2, 3), torch.nan)}, r"layer 0\.weight must be finite"),
}


@pytest.mark.parametrize("case", REFUSED_STATES)
def test_a_state_dict_that_cannot_be_taken_over_is_refused_by_key(case: str) -> None:
    state, message = REFUSED_STATES[case]
    with pytest.raises(InvalidInput, match=message):
        layers_from_state_dict(state, activation="relu")


def test_an_unknown_activation_is_refused_with_those_there_are() -> None:
    with pytest.raises(InvalidInput, match="one of identity, relu, tanh, sigmoid, not 'gelu'"):
        layers_from_state_dict(make_module().state_dict(), activation="gelu")


# --- convolutions, normalisation and pooling -------------------------------------------------------------


def make_images() -> Tensor:
    return torch.randn(4, 2, 6, 6)


def make_vgg() -> nn.Sequential:
    """Every module there is, the statistics of some batches, and weights pruned in two layers; in eval mode."""
    module = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 3, 3, padding="same", bias=False), nn.BatchNorm2d(3, eps=1e-3), nn.ReLU()),
        nn.MaxPool2d(2, stride=1, padding=1),
        nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(1, 0), dilation=(2, 1)),
        nn.Tanh(),
        nn.AvgPool2d((1, 2), padding=(0, 1)),
        nn.Conv2d(4, 4, 1, padding="valid"),
        nn.BatchNorm2d(4, momentum=0.3),
        nn.AdaptiveAvgPool2d((1, None)),
        nn.Flatten(),
        nn.Linear(8, 5),
        nn.BatchNorm1d(5),
        nn.Sigmoid(),
        nn.Linear(5, 3),
    )
    for _ in range(3):
        module(make_images())
    prune.l1_unstructured(module[2], "weight", 0.5)  # type: ignore[no-untyped-call]
    prune.l1_unstructured(module[9], "weight", 0.5)  # type: ignore[no-untyped-call]
    return module.eval()


def test_a_module_of_images_computes_the_same_as_its_parts() -> None:
    module, x = make_vgg(), make_images()
    network = parts_from_module(module, (2, 6, 6))
    kinds = [Input, ConvLayer, BatchNorm, Pool, ConvLayer, Pool, ConvLayer, BatchNorm, Pool, Flatten]
    assert [type(part) for part in network] == [*kinds, Layer, BatchNorm, Layer]
    names = [part.name for part in network if not isinstance(part, Input)]
    assert names == ["0", "1", "3", "4", "6", "7", "8", "9", "10", "11", "12", "14"]
    flat = x.reshape(4, -1).numpy()
    np.testing.assert_allclose(TorchEngine().build(network).forward(flat), outputs_of(module, x), rtol=1e-5)
    again = module_from_parts(network)
    assert not again.training
    np.testing.assert_allclose(outputs_of(again, x), outputs_of(module, x), rtol=1e-5)
    assert {"2.weight_orig", "2.weight_mask", "9.weight_mask"} <= module.state_dict().keys()
    pruned = {"4.weight_orig", "4.weight_mask", "11.weight_mask", "1.num_batches_tracked"}
    assert pruned <= again.state_dict().keys()


def test_what_a_module_is_made_of_is_read() -> None:
    network = parts_from_module(make_vgg(), (2, 6, 6))
    _, first, norm, pool, conv, mean, _, second, everything, *_ = network
    assert isinstance(first, ConvLayer)
    assert isinstance(conv, ConvLayer)
    assert (first.padding, first.bias, first.activation) == ((1, 1), None, "identity")
    assert (conv.stride, conv.padding, conv.dilation, conv.activation) == ((1, 2), (1, 0), (2, 1), "tanh")
    assert conv.sparsity == 0.5
    assert isinstance(norm, BatchNorm)
    assert isinstance(second, BatchNorm)
    assert (norm.activation, norm.epsilon, norm.momentum) == ("relu", 1e-3, 0.1)
    assert second.momentum == 0.3
    assert norm.variance.std() > 0
    assert pool == Pool("3", "max", (2, 2), (1, 1), (1, 1))
    assert mean == Pool("6", "mean", (1, 2), (1, 2), (0, 1))
    assert everything == Pool("9", "mean", (5, 1), (5, 1))


@settings(max_examples=50, deadline=None)
@given(networks())
def test_any_parts_become_a_module_and_come_back(network: list[Part]) -> None:
    module = module_from_parts(network)
    x = torch.from_numpy(samples(network))
    shape = input_shape(network)
    back = parts_from_module(module, shape if len(shape) == 3 else None)
    assert_same(back, network)
    assert_same_state(module_from_parts(back).state_dict(), module.state_dict())
    with torch.no_grad():
        np.testing.assert_array_equal(
            TorchEngine().build(network).forward(x.flatten(1).numpy()), module(x).numpy()
        )


@pytest.mark.parametrize(("length", "count"), [(n, m) for n in range(1, 9) for m in range(1, 9)])
def test_adaptive_pooling_is_read_where_it_is_ordinary(length: int, count: int) -> None:
    module, x = nn.Sequential(nn.AdaptiveAvgPool2d((count, 1))), torch.randn(2, 1, length, 3)
    module.extend([nn.Flatten(), nn.Linear(count, 2)])
    windows = {(i * length // count, -(-(i + 1) * length // count)) for i in range(count)}
    distances = {b - a for (a, _), (b, _) in itertools.pairwise(sorted(windows))}
    if len({end - start for start, end in windows}) > 1 or len(distances) > 1 or len(windows) < count:
        with pytest.raises(
            InvalidInput, match=r"module\[0\] is AdaptiveAvgPool2d to .* windows must be all alike"
        ):
            parts_from_module(module, (1, length, 3))
    else:
        network = parts_from_module(module, (1, length, 3))
        given = TorchEngine().build(network).forward(x.flatten(1).numpy())
        np.testing.assert_allclose(given, outputs_of(module, x), rtol=1e-5, atol=1e-6)


def test_what_does_nothing_is_passed_over() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(7, 2))
    assert [type(part) for part in parts_from_module(module)] == [Layer]
    module = nn.Sequential(nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), nn.Flatten(), nn.Linear(6, 2))
    assert [type(part) for part in parts_from_module(module, (1, 2, 3))] == [Input, Flatten, Layer]


def test_nothing_is_shared_with_a_module_of_images() -> None:
    module = make_vgg()
    network = parts_from_module(module, (2, 6, 6))
    before = copies(network)
    for tensor in module.state_dict().values():
        tensor.zero_()
    assert_same(network, before)


def test_a_channels_last_module_is_read() -> None:
    module = make_vgg()
    network = parts_from_module(module, (2, 6, 6))
    assert_same(parts_from_module(module.to(memory_format=torch.channels_last), (2, 6, 6)), network)


def changed(module: nn.Module, **values: Any) -> nn.Module:
    for name, value in values.items():
        setattr(module, name, value)
    return module


REFUSED_OF_IMAGES: dict[str, tuple[nn.Module, str]] = {
    "groups": (nn.Conv2d(2, 4, 3, groups=2), r"module\[0\] has groups=2, but only groups=1 will do"),
    "padding mode": (nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect', but only"),
    "same": (nn.Conv2d(2, 4, (3, 2), padding="same"), r"module\[0\] has padding='same', .* between the sides"),
    "transposed": (nn.ConvTranspose2d(2, 4, 3), r"module\[0\] is ConvTranspose2d, but only Linear, Conv2d, "),
    "1-D": (nn.Conv1d(2, 4, 3), r"module\[0\] is Conv1d, but only"),
    "too large": (nn.Conv2d(2, 4, 7), r"layer module\[0\] has windows of \(7, 7\), which do not fit"),
    "channels": (nn.Conv2d(3, 4, 3), r"layer module\[0\] takes 3 channels, but input_shape before it has 2"),
    "dropout": (nn.Dropout2d(), r"module\[0\] is Dropout2d, but only .*; leave it out: it does nothing in eval"),
    "max ceil": (nn.MaxPool2d(2, ceil_mode=True), r"module\[0\] has ceil_mode=True, but only ceil_mode=False"),
    "mean ceil": (nn.AvgPool2d(2, ceil_mode=True), "has ceil_mode=True, but only ceil_mode=False"),
    "max dilation": (nn.MaxPool2d(2, dilation=2), "has dilation=2, but only dilation=1 will do"),
    "max indices": (nn.MaxPool2d(2, return_indices=True), "has return_indices=True"),
    "mean of inside": (nn.AvgPool2d(2, padding=1, count_include_pad=False), "has count_include_pad=False"),
    "mean divisor": (nn.AvgPool2d(2, divisor_override=3), "has divisor_override=3"),
    "no padding that fits": (nn.MaxPool2d(2, padding=2), r"module\[0\]: padding \(2, 2\) must be at most half"),
    "other max": (nn.AdaptiveMaxPool2d(1), "is AdaptiveMaxPool2d, but only"),
    "adaptive": (nn.AdaptiveAvgPool2d(4), r"AdaptiveAvgPool2d to \(4, 4\) of \(2, 6, 6\), but its windows must"),
    "no statistics": (nn.BatchNorm2d(2, track_running_stats=False), "has track_running_stats=False, but only"),
    "not affine": (nn.BatchNorm2d(2, affine=False), "has affine=False, but only affine=True will do"),
    "no momentum": (nn.BatchNorm2d(2, momentum=None), "has momentum=None, but only a number will do"),
    "momentum": (nn.BatchNorm2d(2, momentum=2), "momentum must be from 0 to 1, not 2.0"),
    "epsilon": (nn.BatchNorm2d(2, eps=0), "epsilon must be above 0, not 0.0"),
    "normalised channels": (nn.BatchNorm2d(3), r"layer module\[0\] takes 3 channels, but input_shape before"),
    "normalised vectors": (nn.BatchNorm1d(2), r"module\[0\] is BatchNorm1d, but .* has the shape \(2, 6, 6\)"),
    "pruned scale": (
        prune.l1_unstructured(nn.BatchNorm2d(2), "weight", 1),  # type: ignore[no-untyped-call]
        "must hold weight, bias, running_mean, running_var, not",
    ),
    "NaN mean": (
        changed(nn.BatchNorm2d(2), running_mean=torch.full((2,), torch.nan)),
        r"module\[0\]\.running_mean must be finite",
    ),
    "variance": (
        changed(nn.BatchNorm2d(2), running_var=-torch.ones(2)),
        r"module: 0\.variance must not be negative",
    ),
    "flatten": (nn.Flatten(2), r"module\[0\] has start_dim=2, but only start_dim=1 will do"),
    "flatten all": (nn.Flatten(0), r"module\[0\] has start_dim=0, but only start_dim=1 will do"),
    "linear": (
        nn.Linear(6, 6),
        r"layer module\[0\] takes vectors, \(features,\), but input_shape before it gives",
    ),
    "activation": (nn.ReLU(), r"module\[0\] is ReLU, but an activation must follow a Linear, a Conv2d or batch"),
    "after pooling": (
        nn.Sequential(nn.MaxPool2d(2), nn.ReLU()),
        r"module\[0\]\[1\] is ReLU, but .*; before max pooling it does the same",
    ),
    "float64": (nn.Conv2d(2, 4, 3).double(), r"module\[0\]\.weight must be float32"),
    "meta": (nn.BatchNorm2d(2, device="meta"), r"module\[0\]\.weight must be a dense tensor"),
    "complex": (nn.Conv2d(2, 2, 3, dtype=torch.complex64), r"module\[0\]\.weight must be float32"),
}


@pytest.mark.parametrize("case", REFUSED_OF_IMAGES)
def test_a_module_of_images_that_cannot_be_taken_over_is_refused(case: str) -> None:
    module, message = REFUSED_OF_IMAGES[case]
    size = {"momentum": 72, "epsilon": 72, "variance": 72}.get(case, 1)
    with pytest.raises(InvalidInput, match=message):
        parts_from_module(nn.Sequential(module, nn.Flatten(), nn.Linear(size, 2)), (2, 6, 6))


@pytest.mark.parametrize(
    "first", [nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)]
)
def test_a_module_of_images_needs_their_shape(first: nn.Module) -> None:
    message = rf"module\[0\] is {type(first).__name__}: give input_shape, \(channels, height, width\)"
    with pytest.raises(InvalidInput, match=message):
        parts_from_module(nn.Sequential(first, nn.Flatten(), nn.Linear(1, 2)))


@pytest.mark.parametrize("shape", [(28, 28), (1, 0, 28), (1, 28, 28.0), "mnist", 784])
def test_shapes_that_are_none(shape: Any) -> None:
    with pytest.raises(InvalidInput, match="input_shape must be"):
        parts_from_module(nn.Linear(2, 2), shape)


def test_a_module_must_end_with_a_linear() -> None:
    with pytest.raises(InvalidInput, match="module: a network must end with a dense layer"):
        parts_from_module(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()), (1, 3, 3))
    with pytest.raises(InvalidInput, match="module: a network must end with a dense layer"):
        parts_from_module(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))


def test_normalised_vectors_are_read() -> None:
    module = nn.Sequential(nn.BatchNorm1d(7), nn.Linear(7, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    x = make_input()
    module(x)
    network = parts_from_module(module)
    assert [type(part) for part in network] == [BatchNorm, Layer, BatchNorm, Layer]
    given = TorchEngine().build(network).forward(x.numpy())
    np.testing.assert_allclose(given, outputs_of(module.eval(), x), rtol=1e-5, atol=1e-6)
    with pytest.raises(InvalidInput, match="takes 7 inputs, but the layer before gives 6"):
        parts_from_module(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(7, 4)))
    with pytest.raises(InvalidInput, match=r"module\[1\] is MaxPool2d: give input_shape|takes images"):
        parts_from_module(nn.Sequential(nn.Linear(7, 4), nn.MaxPool2d(2)))


def test_the_state_dict_of_a_convolution_is_refused() -> None:
    state = nn.Sequential(nn.Linear(2, 2), nn.Conv2d(1, 2, 3)).state_dict()
    with pytest.raises(InvalidInput, match="layer 1 is a convolution, and a state dict does not tell its stride"):
        layers_from_state_dict(state, activation="relu")


def test_the_state_dict_made_of_images_loads_into_a_module_of_the_same_kind() -> None:
    network = parts_from_module(make_vgg(), (2, 6, 6))
    x, module = make_images(), module_from_parts(network)
    expected = outputs_of(module, x)
    for tensor in module.state_dict().values():
        tensor.zero_()
    module.load_state_dict(state_dict_from_parts(network))
    np.testing.assert_array_equal(outputs_of(module, x), expected)
