from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyflux_prune as fp


def pruned(engine: str, sizes: tuple[int, ...] = (20, 40, 30, 5), activation: str = "relu") -> fp.Network:
    net = fp.mlp(sizes, activation=activation, engine=engine)
    return fp.prune(net, fp.Magnitude(), sparsity=0.8)


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid", "identity"])
@pytest.mark.parametrize("kernels", ["auto", "sparse", "dense", ["sparse", "dense", "auto"]])
def test_outputs_are_those_of_the_network(engine: str, activation: str, kernels: str | list[str]) -> None:
    net = pruned(engine, activation=activation)
    fast = net.sparsify(kernels=kernels)
    for n in (1, 2, 63, 64, 150):
        x = np.random.default_rng(n).standard_normal((n, 20)).astype(np.float32)
        np.testing.assert_allclose(fast(x), net(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(fast(x[0]), net(x[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::pyflux_prune.LayerCollapse")
@given(n=st.integers(1, 200), features=st.integers(1, 40), sparsity=st.floats(0, 0.99))
def test_any_shape(n: int, features: int, sparsity: float) -> None:
    net = fp.prune(fp.mlp([features, 17, 3], engine="torch"), fp.RandomSaliency(), sparsity=sparsity)
    x = np.random.default_rng(n).standard_normal((n, features)).astype(np.float32)
    np.testing.assert_allclose(net.sparsify()(x), net(x), rtol=1e-5, atol=1e-5)


def test_it_is_the_network_as_it_was(engine: str) -> None:
    net, x = pruned(engine), np.ones((3, 20), np.float32)
    fast = net.sparsify()
    before = fast(x)
    net.layers[0].weight[:] = 0
    np.testing.assert_array_equal(fast(x), before)
    assert repr(fast) == "SparseNetwork(density=0.2)"


@pytest.mark.parametrize("kernels", ["fast", ["sparse"], [], ["sparse", "dense", "csr"]])
def test_kernels_must_be_known(engine: str, kernels: str | list[str]) -> None:
    with pytest.raises(fp.InvalidInput, match="kernels must be one of auto, sparse, dense"):
        pruned(engine).sparsify(kernels=kernels)


def test_bad_inputs(engine: str) -> None:
    fast = pruned(engine).sparsify()
    for x in (np.ones((2, 19)), np.full((2, 20), np.nan), np.ones((2, 2, 10)), "x"):
        with pytest.raises(fp.InvalidInput, match="x must"):
            fast(x)


@pytest.mark.parametrize("kernels", ["sparse", "dense"])
@pytest.mark.parametrize("n", [1, 16, 67])
def test_what_is_not_finite_is_found(engine: str, kernels: str, n: int) -> None:
    fast = pruned(engine, sizes=(203, 40, 5)).sparsify(kernels=kernels)
    x = np.full((n, 203), 1e38, np.float32)
    fast(x)
    for sample, feature in ((0, 0), (n - 1, 202), (n // 2, 170), (n - 1, 0), (0, 202)):
        for value in (np.nan, np.inf, -np.inf):
            bad = x.copy()
            bad[sample, feature] = value
            with pytest.raises(
                fp.InvalidInput, match=rf"1 of its {x.size} values .* the first at \({sample}, {feature}\)"
            ):
                fast(bad)


@pytest.mark.parametrize("kernels", ["auto", "sparse", "dense"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 10, 13)])
def test_networks_of_images(engine: str, kernels: str, shape: tuple[int, int, int]) -> None:
    net = fp.lenet5(engine=engine) if shape[0] == 1 else fp.vgg((4, "M", 8), input_shape=shape, engine=engine)
    fast = fp.prune(net, sparsity=0.8).sparsify(kernels=kernels)
    for n in (1, 70):
        x = np.random.default_rng(n).standard_normal((n, *shape)).astype(np.float32)
        np.testing.assert_allclose(fast(x), net(x), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(fast(x.reshape(n, -1)), fast(x))
    np.testing.assert_allclose(fast(x[0]), net(x[0]), rtol=1e-5, atol=1e-5)
    with pytest.raises(fp.InvalidInput, match="x must"):
        fast(x[:, :, 1:])
    x[3, 0, 5, 6] = np.nan
    with pytest.raises(fp.InvalidInput, match="1 of its"):
        fast(x)


@pytest.mark.julia
def test_what_the_c_function_cannot_do_is_done_by_a_call_that_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyflux_prune.engines import julia

    net, x = pruned("julia"), np.ones((70, 20), np.float32)
    monkeypatch.setattr(julia, "_infer_function", lambda: lambda *arguments: -1)
    np.testing.assert_allclose(net.sparsify()(x), net(x), rtol=1e-5, atol=1e-5)
