from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyflux_prune as fp
from pyflux_prune.engines import Layer, get_engine

per_engine = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def arrays(net: fp.Network) -> list[np.ndarray]:
    return [a.copy() for la in net.layers for a in (la.weight, la.mask, la.bias) if a is not None]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_mlp_is_a_network_of_dense_layers(engine: str) -> None:
    net = fp.mlp([4, 8, 3], seed=1, engine=engine)
    assert [la.weight.shape for la in net.layers] == [(8, 4), (3, 8)]
    assert [la.name for la in net.layers] == ["0", "2"]
    assert [la.activation for la in net.layers] == ["relu", "identity"]
    assert net.sparsity == 0
    assert net.engine == engine
    assert repr(net) == f"Network(4–8–3, density=1, engine={engine!r})"
    first = net.layers[0].weight
    assert np.abs(first).max() <= np.sqrt(6 / 12)
    assert same(arrays(net), arrays(fp.mlp([4, 8, 3], seed=1, engine=engine)))
    assert not same(arrays(net), arrays(fp.mlp([4, 8, 3], seed=2, engine=engine)))


@pytest.mark.julia
def test_both_engines_begin_with_the_same_weights() -> None:
    assert same(arrays(fp.mlp([5, 7, 2], engine="julia")), arrays(fp.mlp([5, 7, 2], engine="torch")))


@pytest.mark.parametrize("activation", ["identity", "relu", "tanh", "sigmoid"])
def test_calling_it_is_the_masked_forward_pass(engine: str, activation: str) -> None:
    net = fp.mlp([6, 9, 4], activation=activation, engine=engine)
    fp.prune(net, sparsity=0.4)
    for la in net.layers:
        la.bias[:] = np.linspace(-1, 1, len(la.bias))
    x = np.random.default_rng(0).normal(size=(11, 6)).astype(np.float32)
    f = {
        "identity": lambda z: z,
        "relu": lambda z: np.maximum(z, 0),
        "tanh": np.tanh,
        "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    }[activation]
    one, two = net.layers
    expected = f(x @ (one.weight * one.mask).T + one.bias) @ (two.weight * two.mask).T + two.bias
    np.testing.assert_allclose(net(x), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(net(x[0]), expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(net.predict(x), expected.argmax(1))
    assert net(x).shape == (11, 4)
    assert net(x).dtype == np.float32
    np.testing.assert_allclose(net(x.astype(np.float64)), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(net(x[::2]), expected[::2], rtol=1e-5, atol=1e-6)


def test_pruned_positions_never_count_whatever_is_written_there(engine: str) -> None:
    net = fp.prune(fp.mlp([6, 9, 4], engine=engine), sparsity=0.5)
    x = np.ones((3, 6), np.float32)
    before = net(x).copy()
    for la in net.layers:
        la.weight[~la.mask] = np.nan
    np.testing.assert_array_equal(net(x), before)


def test_views_share_the_engine_s_memory(engine: str) -> None:
    net = fp.mlp([3, 2], engine=engine)
    x = np.eye(3, dtype=np.float32)
    net.layers[0].weight[1, 2] = 7
    assert net(x)[2, 1] == 7
    assert net.layers[0].weight[1, 2] == 7
    net.layers[0].mask[1, 2] = False
    assert net(x)[2, 1] == 0
    assert np.shares_memory(net.weights[0], net.weights[0])
    assert np.shares_memory(net.masks[0], net.masks[0])
    view = net.layers[0].weight
    del net
    import gc

    gc.collect()
    assert np.isfinite(view).all()


@pytest.mark.filterwarnings("ignore::pyflux_prune.LayerCollapse")
@per_engine
@given(
    widths=st.lists(st.integers(1, 12), min_size=2, max_size=5),
    targets=st.lists(st.floats(0, 0.999), min_size=1, max_size=4).map(sorted),
    layerwise=st.booleans(),
    random=st.booleans(),
    seed=st.integers(0, 99),
)
def test_prune_is_exact_monotone_and_final(
    engine: str, widths: list[int], targets: list[float], layerwise: bool, random: bool, seed: int
) -> None:
    net = fp.mlp(widths, seed=seed, engine=engine)
    structure = fp.Layerwise() if layerwise else fp.Global()
    saliency = fp.RandomSaliency(seed) if random else fp.Magnitude()
    for s in targets:
        before = [m.copy() for m in net.masks]
        assert fp.prune(net, saliency, sparsity=s, structure=structure) is net
        after = [m.copy() for m in net.masks]
        groups = after if layerwise else [np.concatenate([m.ravel() for m in after])]
        for m in groups:
            assert (~m).sum() == round(s * m.size)
        assert all((b >= a).all() for b, a in zip(before, after, strict=True))
        assert all((la.weight[~la.mask] == 0).all() for la in net.layers)
        state = arrays(net)
        fp.prune(net, saliency, sparsity=s, structure=structure)
        assert same(state, arrays(net))


@pytest.mark.julia
@pytest.mark.filterwarnings("ignore::pyflux_prune.LayerCollapse")
@per_engine
@given(
    widths=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    targets=st.lists(st.floats(0, 0.999), min_size=1, max_size=3).map(sorted),
    layerwise=st.booleans(),
    seed=st.integers(0, 99),
    levels=st.sampled_from([None, 1, 3]),
)
def test_masks_are_the_same_on_both_engines_even_with_ties(
    widths: list[int], targets: list[float], layerwise: bool, seed: int, levels: int | None
) -> None:
    start = fp.mlp(widths, seed=seed, engine="torch")
    if levels:  # many equal magnitudes
        for la in start.layers:
            la.weight[:] = np.round(la.weight * levels) / levels
    nets = [start.copy(name) for name in ("julia", "torch")]
    structure = fp.Layerwise() if layerwise else fp.Global()
    for s in targets:
        ours, theirs = (fp.prune(net, sparsity=s, structure=structure).masks for net in nets)
        assert all((a == b).all() for a, b in zip(ours, theirs, strict=True))


def test_one_sparsity_per_layer(engine: str) -> None:
    net = fp.prune(fp.mlp([10, 10, 10], engine=engine), sparsity=[0.2, 0.75], structure=fp.Layerwise())
    assert [int(m.sum()) for m in net.masks] == [80, 25]
    assert net.layers[1].density == 0.25


def samples(n: int = 40, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    return rng.normal(size=(n, 6)).astype(np.float32), np.arange(n) % classes


def test_criteria_score_with_the_data_given(engine: str) -> None:
    x, y = samples()
    masks = []
    for data in ((x, y), (x.astype(np.float64), y.astype(np.int32)), fp.datasets.arrays(x, y, x[:1], y[:1])):
        net = fp.prune(fp.mlp([6, 9, 4], engine=engine), fp.Taylor(), sparsity=0.5, data=data)
        masks.append(net.masks)
    assert all(same(masks[0], other) for other in masks)
    other = fp.prune(fp.mlp([6, 9, 4], engine=engine), fp.Taylor(), sparsity=0.5, data=(x, y[::-1].copy()))
    assert not same(masks[0], other.masks)


def test_a_structure_or_criterion_may_say_itself_how_much_goes(engine: str) -> None:
    net = fp.prune(fp.mlp([8, 12, 4], engine=engine), structure=fp.NofM(2, 4))
    assert all((m.reshape(-1, 4).sum(1) == 2).all() for m in net.masks)
    net = fp.prune(fp.mlp([8, 12, 4], engine=engine), fp.Threshold(tau=0.3))
    assert all((np.abs(la.weight[la.mask]) >= 0.3).all() for la in net.layers)


def test_losing_a_layer_is_told(engine: str) -> None:
    net = fp.mlp([6, 9, 4], engine=engine)
    net.layers[1].weight[:] *= 100
    with pytest.warns(fp.LayerCollapse, match=r"no weight in layer 0.*min_kept=1"):
        fp.prune(net, sparsity=0.8)
    net = fp.mlp([6, 9, 4], engine=engine)
    net.layers[1].weight[:] *= 100
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.prune(net, sparsity=0.8, structure=fp.Global(min_kept=1))
    assert net.masks[0].sum() == 1


def test_a_compact_network_computes_the_same(engine: str) -> None:
    net = fp.mlp([6, 9, 8, 4], activation="sigmoid", engine=engine)
    for la in net.layers:
        la.bias[:] = np.linspace(-1, 1, len(la.bias))
    fp.prune(net, sparsity=0.5, structure=fp.Neurons())
    fp.prune(net, sparsity=0.8)
    before, small = arrays(net), net.compact()
    assert same(before, arrays(net))
    assert small.engine == engine
    assert sum(w.size for w in small.weights) < sum(w.size for w in net.weights) / 2
    assert sum(int(m.sum()) for m in small.masks) <= sum(int(m.sum()) for m in net.masks)
    x, _ = samples()
    np.testing.assert_allclose(small(x), net(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"sparsity": 1.0}, ["sparsity", "1.0"]),
        ({"sparsity": -0.5}, ["sparsity", "-0.5"]),
        ({"sparsity": float("nan")}, ["sparsity", "nan"]),
        ({"sparsity": 0.1}, ["0.1", "pruned"]),
        ({"sparsity": [0.5, 0.6]}, ["sparsity"]),
        ({"sparsity": [0.5, 0.6, 0.7], "structure": fp.Layerwise()}, ["sparsity"]),
        ({"sparsity": [0.9, 0.01], "structure": fp.Layerwise()}, ["0.01", "pruned"]),
        ({"sparsity": 0.5, "structure": "global"}, ["structure", "'global'"]),
        ({"sparsity": 0.5, "saliency": "magnitude"}, ["saliency", "'magnitude'"]),
        ({}, ["sparsity must be given"]),
        ({"sparsity": 0.5, "saliency": fp.SNIP()}, ["data must be given", "SNIP"]),
        ({"sparsity": 0.5, "saliency": fp.SNIP(per_class=11), "data": samples()}, ["11", "10"]),
        ({"sparsity": 0.5, "saliency": fp.Activation(), "data": samples()}, ["Neurons", "Activation"]),
        ({"sparsity": 0.5, "data": "digits"}, ["data", "'digits'"]),
        ({"sparsity": 0.5, "data": samples()[0]}, ["data must be a Dataset, or inputs and labels"]),
        ({"sparsity": 0.5, "data": (samples()[0][:, :5], samples()[1])}, ["data's x", "(samples, 6)"]),
        ({"sparsity": 0.5, "data": (samples()[0] * np.nan, samples()[1])}, ["data's x", "finite"]),
        ({"sparsity": 0.5, "data": samples(classes=5)}, ["data's y", "0 to 3", "4"]),
        ({"sparsity": 0.5, "data": fp.datasets.arrays(*samples(classes=5))}, ["5 classes", "4 outputs"]),
        ({"sparsity": 0.5, "structure": fp.NofM()}, ["multiple", "4", "6", "exclude"]),
        ({"sparsity": 0.5, "structure": fp.Global(exclude=2)}, ["exclude", "2"]),
        ({"sparsity": 0.5, "structure": fp.Global(exclude=(0, 1))}, ["exclude must leave layers", "not (0, 1)"]),
        ({"sparsity": 0.5, "structure": fp.Neurons(exclude=(0,))}, ["exclude must leave layers", "not (0,)"]),
        ({"sparsity": (0.5, 0.5), "structure": fp.ERK()}, ["sparsity must be one number with ERK", "one per"]),
    ],
)
def test_bad_pruning_changes_nothing(engine: str, arguments: dict[str, object], names: list[str]) -> None:
    net = fp.prune(fp.mlp([6, 9, 4], engine=engine), sparsity=0.3)
    before = arrays(net)
    with pytest.raises(fp.InvalidInput) as caught:
        fp.prune(net, **arguments)  # type: ignore[arg-type]
    for name in names:
        assert name in str(caught.value)
    assert same(before, arrays(net))


def test_weights_that_are_nan_cannot_be_ranked(engine: str) -> None:
    net = fp.mlp([6, 9, 4], engine=engine)
    net.layers[1].weight[0, 0] = np.nan
    with pytest.raises(fp.InvalidInput, match="NaN"):
        fp.prune(net, sparsity=0.5)
    assert net.sparsity == 0


@pytest.mark.parametrize(
    ("x", "names"),
    [
        (np.zeros((3, 5)), ["6", "5"]),
        (np.zeros((3, 2, 6)), ["x"]),
        (np.full((3, 6), np.nan), ["x", "NaN"]),
        (np.array([["a"] * 6]), ["x"]),
        (np.zeros((0, 6)), ["x"]),
        (np.zeros((2, 6), complex), ["x", "complex"]),
    ],
)
def test_bad_inputs_are_named(engine: str, x: np.ndarray, names: list[str]) -> None:
    with pytest.raises(fp.InvalidInput) as caught:
        fp.mlp([6, 4], engine=engine)(x)
    for name in names:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([[1, 2], [3]], r"x must be an array of numbers, not \[\[1, 2\], \[3\]\]: .*inhomogeneous"),
        (torch.ones(3, 6, requires_grad=True), r"x must be an array of numbers, not tensor.*detach"),
        (np.zeros(5), r"x must have the shape \(samples, 6\), or \(6,\) of one sample, not \(5,\)"),
        (5, r"x must have the shape \(samples, 6\), not \(\)"),
    ],
)
def test_what_is_no_array_is_named(engine: str, x: object, message: str) -> None:
    net = fp.mlp([6, 4], engine=engine)
    for function in (net, net.sparsify(), net.predict):
        with pytest.raises(fp.InvalidInput, match=message):
            function(x)  # type: ignore[operator]


def test_arrays_may_lie_anywhere_in_memory(engine: str) -> None:
    x, y = samples()
    odd_x = np.frombuffer(b"x" + x.tobytes(), np.float32, offset=1).reshape(x.shape)
    odd_y = np.frombuffer(b"y" + y.tobytes(), np.int64, offset=1)
    assert not odd_x.flags.aligned
    net = fp.mlp([6, 9, 4], engine=engine)
    np.testing.assert_array_equal(net(odd_x), net(x))
    np.testing.assert_array_equal(net.sparsify()(odd_x), net.sparsify()(x))
    data = fp.datasets.arrays(odd_x, odd_y, odd_x, odd_y)
    fp.iterative_prune(net, data, saliency=fp.Taylor(), schedule=[0.5], training=fp.Training(epochs=1))
    fp.prune(net, fp.Taylor(), sparsity=0.6, data=(odd_x, odd_y))
    assert net.sparsity == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("kernels", [None, 5, "fast", ["auto"], [["auto"], ["auto"]], ["auto", None], {"auto": 1}])
def test_unknown_kernels_are_named(engine: str, kernels: Any) -> None:
    with pytest.raises(
        fp.InvalidInput, match=r"kernels must be one of auto, sparse, dense, or a list .* 2 layers"
    ):
        fp.mlp([6, 9, 4], engine=engine).sparsify(kernels=kernels)


def test_kernels_may_be_of_numpy(engine: str) -> None:
    x = np.eye(6)
    for sizes, kernels in (([6, 4], np.str_("dense")), ([6, 9, 4], np.array(["sparse", "dense"]))):
        net = fp.mlp(sizes, engine=engine)
        np.testing.assert_allclose(net.sparsify(kernels=kernels)(x), net(x), rtol=1e-5, atol=1e-6)


def test_a_sparse_network_stays_in_its_process(engine: str) -> None:
    fast = fp.mlp([6, 4], engine=engine).sparsify()
    with pytest.raises(TypeError, match="pickle the network, and call its sparsify again"):
        pickle.dumps(fast)
    assert copy.deepcopy([fast]) == [fast]


def test_what_is_no_network_is_named() -> None:
    with pytest.raises(fp.InvalidInput, match="net must be Network, not 5"):
        fp.to_torch(5)  # type: ignore[arg-type]


def test_layers_are_compared_by_identity() -> None:
    net, other = (fp.vgg((2,), input_shape=(1, 4, 4), engine="torch") for _ in range(2))
    assert [a == b for a, b in zip(net.layers, other.layers, strict=True)] == [False, False]
    assert net.parts != other.parts
    assert len({*net.layers}) == 2


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (([6],), "sizes"),
        (({6: 1, 2: 1},), "sizes"),
        ((np.zeros((2, 2), int),), "each of sizes"),
        (([6, 0],), "sizes"),
        (([6, 2.5],), "sizes"),
        (("64",), "sizes"),
        ((7,), "sizes"),
    ],
)
def test_bad_sizes_are_named(arguments: tuple[object], name: str) -> None:
    with pytest.raises(fp.InvalidInput, match=name):
        fp.mlp(*arguments, engine="torch")  # type: ignore[arg-type]


def test_unknown_names_are_listed_with_the_known() -> None:
    with pytest.raises(fp.InvalidInput, match=r"relu, tanh, sigmoid.*'swish'"):
        fp.mlp([2, 2], activation="swish", engine="torch")
    for engine in ("jax", ["julia"], None):
        with pytest.raises(fp.InvalidInput, match=r"engine must be one of auto, julia, torch, not \S+$"):
            fp.mlp([2, 2], engine=engine)  # type: ignore[arg-type]


def test_saving_and_loading(engine: str, tmp_path: Path) -> None:
    net = fp.prune(fp.mlp([6, 9, 4], activation="tanh", engine=engine), sparsity=0.7)
    x = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    for sparse in (False, True):
        net.save(tmp_path / "model.safetensors", sparse=sparse)
        back = fp.Network.load(tmp_path / "model.safetensors", engine=engine)
        assert same(arrays(net), arrays(back))
        np.testing.assert_array_equal(net(x), back(x))
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_copy_is_independent(engine: str) -> None:
    net = fp.mlp([6, 9, 4], engine=engine)
    for other in (net.copy(), copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert other.engine == engine
        assert same(arrays(other), arrays(net))
        fp.prune(other, sparsity=0.5)
        assert net.sparsity == 0
        assert other.sparsity == 0.5


def test_torch_and_back(engine: str) -> None:
    net = fp.prune(fp.mlp([6, 9, 4], engine=engine), sparsity=0.6)
    x = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    module = fp.to_torch(net)
    with torch.no_grad():
        np.testing.assert_allclose(module(torch.from_numpy(x)).numpy(), net(x), rtol=1e-5, atol=1e-6)
    assert {"weight_orig", "bias"} <= dict(module[0].named_parameters()).keys()
    assert same(arrays(fp.from_torch(module, engine=engine)), arrays(net))
    assert same(arrays(fp.from_torch(module.state_dict(), activation="relu", engine=engine)), arrays(net))
    with pytest.raises(fp.InvalidInput, match="activation"):
        fp.from_torch(module.state_dict(), engine=engine)
    with pytest.raises(fp.InvalidInput, match="activation is for a state dict"):
        fp.from_torch(module, activation="relu", engine=engine)
    with pytest.raises(fp.InvalidInput, match="input_shape is for a module"):
        fp.from_torch(module.state_dict(), activation="relu", input_shape=(1, 2, 3), engine=engine)


def test_a_layer_without_bias(engine: str) -> None:
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    net = fp.Network(get_engine(engine).build([Layer("0", weight, np.ones((2, 3), bool), None, "identity")]))
    np.testing.assert_array_equal(net(np.eye(3)), weight.T)
    assert net.layers[0].bias is None
    y = np.zeros(3, np.int64)
    _, [(gradient, no_bias)] = net.model.loss_and_gradients(np.eye(3, dtype=np.float32), y)
    assert no_bias is None
    assert gradient.shape == (2, 3)
    net.model.start(fp.Adam())
    net.model.train(np.eye(3, dtype=np.float32), y, np.arange(3), 2)
