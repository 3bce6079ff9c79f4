"""LeNet-5 and small VGGs, and what networks of images can do whichever engine holds them."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from any_networks import assert_same

import pyflux_prune as fp
from pyflux_prune.engines.parts import BatchNorm, ConvLayer, Input, Part, Pool, arrays, copies
from pyflux_prune.measure import measure


def tiny(engine: str = "torch", **options: Any) -> fp.Network:
    defaults: dict[str, Any] = {"channels": (3, "M", 4, "M"), "input_shape": (2, 6, 6), "classes": 3}
    return fp.vgg(**defaults | options, engine=engine)


def moved(net: fp.Network) -> fp.Network:
    """The network, with other biases and statistics than the initial ones."""
    rng = np.random.default_rng(1)
    parts: list[Part] = copies(net.parts)
    for part in parts:
        for name, array in arrays(part).items():
            if name not in ("weight", "mask"):
                array[:] = rng.random(array.shape) + 0.1
    net.model.load(parts)
    return net


def images(n: int = 5) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, 2, 6, 6)).astype(np.float32)


def test_lenet5_is_that_of_the_literature(engine: str) -> None:
    net = fp.lenet5(seed=3, engine=engine)
    assert [w.shape for w in net.weights] == [(6, 1, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)]
    assert [la.activation for la in net.layers] == ["relu"] * 4 + ["identity"]
    assert [la.name for la in net.layers] == ["0", "3", "7", "9", "11"]
    assert (net.input_shape, net.features, net.outputs) == ((1, 28, 28), 784, 10)
    widths = "6@5×5–max2×2–16@5×5–max2×2–120–84–10"
    assert repr(net) == f"Network(1×28×28–{widths}, density=1, engine={engine!r})"
    assert [cost.flops for cost in measure(net.parts)] == [235_200, 480_000, 96_000, 20_160, 1_680]
    limit = np.sqrt(6 / ((6 + 16) * 25))
    assert 0.95 * limit < np.abs(net.weights[1]).max() <= limit
    assert all(not la.bias.any() for la in net.layers if la.bias is not None)
    assert_same(fp.lenet5(seed=3, engine=engine).parts, net.parts)
    assert not np.array_equal(fp.lenet5(seed=4, engine=engine).weights[0], net.weights[0])


@pytest.mark.parametrize(
    ("shape", "padding", "features"),
    [
        ((3, 32, 32), (0, 0), 400),
        ((1, 28, 28), (2, 2), 400),
        ((1, 12, 40), (2, 0), 112),
        ((1, 48, 31), (0, 2), 720),
    ],
)
def test_lenet5_takes_other_images(shape: tuple[int, int, int], padding: tuple[int, int], features: int) -> None:
    net = fp.lenet5(input_shape=shape, classes=7, activation="tanh", engine="torch")
    first = net.layers[0]
    assert isinstance(first, ConvLayer)
    assert first.padding == padding
    assert net.weights[2].shape == (120, features)
    assert net(np.zeros((2, *shape))).shape == (2, 7)


def test_vgg_is_made_of_what_it_is_told(engine: str) -> None:
    net = tiny(engine, hidden=(5,))
    assert [w.shape for w in net.weights] == [(3, 2, 3, 3), (4, 3, 3, 3), (5, 4), (3, 5)]
    assert [la.bias is None for la in net.layers] == [True, True, False, False]
    norms = [part for part in net.parts if isinstance(part, BatchNorm)]
    assert [(norm.name, norm.activation) for norm in norms] == [("1", "relu"), ("5", "relu")]
    assert all((norm.weight == 1).all() and (norm.variance == 1).all() for norm in norms)
    assert all(not norm.bias.any() and not norm.mean.any() for norm in norms)
    assert net.parts[0] == Input((2, 6, 6))
    assert net.parts[3] == Pool("3", "max", (2, 2), (2, 2))
    plain = tiny(engine, batch_norm=False, activation="tanh")
    assert [la.activation for la in plain.layers] == ["tanh", "tanh", "identity"]
    assert all(la.bias is not None for la in plain.layers)
    assert repr(plain).startswith("Network(2×6×6–3@3×3–max2×2–4@3×3–max2×2–3, ")


def test_vgg16_has_the_published_number_of_parameters() -> None:
    net = fp.vgg(fp.VGG16, input_shape=(3, 32, 32), engine="torch")
    assert [layer.weight.ndim for layer in net.layers] == [4] * 13 + [2]
    # With biases in its convolutions, which batch normalisation takes away again, 14,728,266.
    assert sum(p.numel() for p in fp.to_torch(net).parameters()) == 14_728_266 - 4_224


@pytest.mark.julia
@pytest.mark.parametrize("make", [fp.lenet5, tiny, fp.vgg])
def test_both_engines_begin_with_the_same_parts(make: Any) -> None:
    assert_same(make(engine="julia").parts, make(engine="torch").parts)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (fp.lenet5, {"input_shape": (1, 8, 8)}, "lenet5: layer 3 has windows of"),
        (fp.lenet5, {"input_shape": (28, 28)}, r"input_shape must be \(channels, height, width\), not \(28, 28\)"),
        (fp.lenet5, {"input_shape": (1, 28, 0)}, "each of input_shape must be a whole number"),
        (fp.lenet5, {"classes": 0}, "classes must be a whole number"),
        (fp.lenet5, {"activation": "gelu"}, "activation must be one of identity, relu, tanh, sigmoid, not 'gelu'"),
        (fp.lenet5, {"seed": -1}, "seed must be"),
        (fp.vgg, {"channels": (8, "M") * 5}, r"vgg: layer \d+ has windows of \(2, 2\), which do not fit into"),
        (fp.vgg, {"channels": 32}, r"channels must be a sequence, such as \(32, 'M'\), not 32"),
        (fp.vgg, {"channels": "M"}, "channels must be a sequence, such as"),
        (
            fp.vgg,
            {"channels": (8, "A")},
            'each of channels but "M" must be a whole number',
        ),
        (fp.vgg, {"hidden": 100}, r"hidden must be a sequence, such as \(100,\), not 100"),
        (fp.vgg, {"hidden": (0,)}, "each of hidden must be"),
        (fp.vgg, {"batch_norm": 1}, "batch_norm must be True or False, not 1"),
    ],
)
def test_bad_architectures_are_named(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(fp.InvalidInput, match=message):
        make(**options, engine="torch")


@pytest.mark.parametrize("criterion", [fp.OBD(), fp.OBS(full=True), fp.Redundancy(), fp.Redundancy(True)])
def test_some_criteria_are_for_dense_layers_only(engine: str, criterion: Any) -> None:
    x, y = images(12), np.arange(12) % 3
    structure = fp.Neurons() if criterion.of_neurons else fp.Global()
    message = (
        rf"saliency {re.escape(str(criterion))} is for networks of dense layers only, but net has other parts$"
    )
    with pytest.raises(fp.InvalidInput, match=message):
        fp.prune(tiny(engine), criterion, sparsity=0.5, structure=structure, data=(x, y))
    with pytest.raises(fp.InvalidInput, match=message):
        tiny(engine).model.scores(criterion, (x.reshape(12, -1), y))
    dense = fp.vgg((), (4,), input_shape=(2, 6, 6), classes=3, engine=engine)
    fp.prune(dense, criterion, sparsity=0.2, structure=structure, data=(x, y))


def test_sizes_may_be_arrays() -> None:
    assert fp.mlp(np.array([4, 3, 2]), engine="torch").sketch == "4–3–2"  # type: ignore[arg-type]
    shape = np.array([1, 12, 12])
    assert fp.lenet5(input_shape=shape, engine="torch").input_shape == (1, 12, 12)  # type: ignore[arg-type]
    net = fp.vgg(np.array([3, 4]), np.array([5]), input_shape=shape, engine="torch")  # type: ignore[arg-type]
    assert net.sketch == "1×12×12–3@3×3–4@3×3–5–10"


def test_vgg_without_convolutions_is_a_perceptron_of_images() -> None:
    net = fp.vgg((), (4,), input_shape=(1, 3, 3), engine="torch")
    assert [w.shape for w in net.weights] == [(4, 9), (10, 4)]
    x = np.random.default_rng(0).random((2, 1, 3, 3), np.float32)
    np.testing.assert_array_equal(net(x), net(x.reshape(2, 9)))


def test_samples_may_be_images_or_flat(engine: str) -> None:
    net, x = moved(tiny(engine)), images()
    expected = net(x)
    assert expected.shape == (5, 3)
    np.testing.assert_array_equal(net(x.reshape(5, 72)), expected)
    np.testing.assert_array_equal(net(x.astype(np.float64)), expected)
    backwards = np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1]
    np.testing.assert_array_equal(net(backwards), expected)
    np.testing.assert_allclose(net(x[0]), expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(net(x[0].ravel()), expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(net.predict(x), expected.argmax(1))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((5, 71)), r"x must have the shape \(samples, 72\) or \(samples, 2, 6, 6\), not \(5, 71\)"),
        (np.zeros((5, 6, 6, 2)), r"not \(5, 6, 6, 2\)"),
        (np.zeros((5, 6, 6)), r"not \(5, 6, 6\)"),
        (np.zeros((0, 2, 6, 6)), "must not be empty"),
        (np.full((1, 2, 6, 6), np.nan), "72 of its 72 values are NaN"),
    ],
)
def test_bad_images_are_named(x: np.ndarray, message: str) -> None:
    with pytest.raises(fp.InvalidInput, match=message):
        tiny()(x)


def test_data_may_be_images_or_flat(engine: str) -> None:
    x, y = images(12), np.arange(12) % 3
    masks = []
    for data in ((x, y), (x.reshape(12, 72), y), fp.datasets.arrays(x, y, x, y)):
        net = fp.prune(moved(tiny(engine)), fp.Taylor(), sparsity=0.5, data=data)
        masks.append(np.concatenate([mask.ravel() for mask in net.masks]))
    np.testing.assert_array_equal(masks[0], masks[1])
    np.testing.assert_array_equal(masks[0], masks[2])
    with pytest.raises(fp.InvalidInput, match=r"data's x must .* or \(samples, 2, 6, 6\)"):
        fp.prune(tiny(engine), fp.Taylor(), sparsity=0.5, data=(x[:, :1], y))
    other = fp.datasets.arrays(x.reshape(12, 6, 6, 2), y, x.reshape(12, 6, 6, 2), y)
    with pytest.raises(fp.InvalidInput, match=r"samples of the shape \(6, 6, 2\), but net takes \(2, 6, 6\)"):
        fp.prune(tiny(engine), fp.Taylor(), sparsity=0.5, data=other)
    fp.prune(fp.mlp([72, 3], engine=engine), fp.Taylor(), sparsity=0.5, data=other)


def test_copies_files_and_pickles_are_the_same_network(engine: str, tmp_path: Path) -> None:
    net, x = fp.prune(moved(tiny(engine, hidden=(5,))), sparsity=0.6), images()
    for sparse in (False, True):
        net.save(tmp_path / "model.safetensors", sparse=sparse)
        back = fp.Network.load(tmp_path / "model.safetensors", engine=engine)
        assert_same(back.parts, net.parts)
        np.testing.assert_array_equal(back(x), net(x))
    for other in (net.copy(), copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert other.engine == engine
        assert_same(other.parts, net.parts)
        moved(other).parts[2].weight[:] = 7  # type: ignore[union-attr]
        assert other.parts[2].weight[0] == 7  # type: ignore[union-attr]
        assert net.parts[2].weight[0] == 1  # type: ignore[union-attr]


def test_torch_and_back(engine: str) -> None:
    import torch

    net, x = fp.prune(moved(tiny(engine, hidden=(5,))), sparsity=0.6), images()
    module = fp.to_torch(net)
    with torch.no_grad():
        np.testing.assert_allclose(module(torch.from_numpy(x)).numpy(), net(x), rtol=1e-5, atol=1e-6)
    back = fp.from_torch(module, input_shape=(2, 6, 6), engine=engine)
    assert_same(back.parts, net.parts)


def test_a_compact_network_of_images_computes_the_same(engine: str) -> None:
    net, x = moved(tiny(engine, channels=(6, "M", 8), hidden=(9,))), images()
    fp.prune(net, sparsity=0.5, structure=fp.Neurons(layerwise=True))
    fp.prune(net, sparsity=0.8)
    before, small = copies(net.parts), net.compact()
    assert_same(net.parts, before)
    assert sum(w.size for w in small.weights) < sum(w.size for w in net.weights) / 2
    assert sum(c.flops for c in measure(small.parts)) <= sum(c.flops for c in measure(net.parts))
    np.testing.assert_allclose(small(x), net(x), rtol=1e-4, atol=1e-5)


def test_flops_are_those_of_kept_weights_at_each_place() -> None:
    net = tiny(hidden=(5,))
    assert [c.flops for c in measure(net.parts)] == [2 * 54 * 36, 2 * 108 * 9, 2 * 20, 2 * 15]
    fp.prune(net, sparsity=0.5, structure=fp.Layerwise())
    costs = measure(net.parts)
    assert [c.flops for c in costs] == [2 * 27 * 36, 2 * 54 * 9, 2 * 10, 2 * 7]
    assert [c.shape for c in costs] == [(3, 2, 3, 3), (4, 3, 3, 3), (5, 4), (3, 5)]
    assert [c.bytes for c in costs] == [4 * 54 + 7, 4 * 108 + 14, 4 * 20 + 3 + 20, 4 * 15 + 2 + 12]
    assert measure(net.parts, sparse=True)[0].bytes == 4 * 27 + 7
