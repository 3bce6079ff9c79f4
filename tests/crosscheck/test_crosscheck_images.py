"""Both engines on networks of images, and what is left out of comparing them."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

import pyflux_prune as fp
from pyflux_prune.crosscheck import off_kinks, torch_masks
from pyflux_prune.datasets import Dataset
from pyflux_prune.engines.parts import BatchNorm, ConvLayer, Flatten, Input, Layer, Part, Pool, numbered
from pyflux_prune.network import build

crosscheck = sys.modules["pyflux_prune.crosscheck"]


@pytest.fixture(scope="module")
def digits() -> Dataset:
    """A few of the digits, 8 × 8."""
    data = fp.datasets.digits()
    x, y = data.x_train[:240].reshape(240, 1, 8, 8), data.y_train[:240]
    return fp.datasets.arrays(x, y, data.x_test[:300], data.y_test[:300], name="few digits")


@pytest.fixture(scope="module")
def large_digits(digits: Dataset) -> Dataset:
    """The same, each pixel three times as wide and high, in the middle of 28 × 28."""

    def enlarged(x: np.ndarray) -> np.ndarray:
        images = x.reshape(-1, 1, 8, 8).repeat(3, axis=2).repeat(3, axis=3)
        return np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)))

    train, test = enlarged(digits.x_train), enlarged(digits.x_test)
    return fp.datasets.arrays(train, digits.y_train, test, digits.y_test, name="large digits")


EACH = [
    (fp.Magnitude(), fp.Global()),
    (fp.Magnitude(), fp.Layerwise()),
    (fp.Magnitude(), fp.ERK()),
    (fp.Taylor(), fp.Global()),
    (fp.SNIP(per_class=5), fp.Global()),
    (fp.GraSP(per_class=5), fp.Global(min_kept=2)),
    (fp.SynFlow(iterations=20), fp.Global()),
    (fp.Wanda(), fp.PerOutput()),
    (fp.Wanda(), fp.NofM(1, 2, exclude=0)),
    (fp.OBS(iterations=3), fp.Layerwise()),
    (fp.Magnitude(), fp.Neurons(norm=2, layerwise=True)),
    (fp.Taylor(), fp.Neurons(min_kept=2)),
    (fp.Activation(), fp.Neurons(min_kept=2)),
    (fp.Movement(fp.Training(epochs=1)), fp.Layerwise()),
    (fp.EdgePopup(0.5, fp.Training(epochs=1)), fp.Layerwise()),
]


@pytest.mark.parametrize("second", [pytest.param("julia", marks=pytest.mark.julia), "torch"])
@pytest.mark.parametrize(("saliency", "structure"), EACH)
def test_both_engines_agree_on_images(
    digits: Dataset, saliency: fp.Taylor, structure: fp.Global, second: str
) -> None:
    net = fp.vgg((4, "M", 6, "M"), (10,), input_shape=(1, 8, 8), engine="torch")
    result = fp.crosscheck(
        net,
        digits,
        saliency=saliency,
        structure=structure,
        schedule=[0.25, 0.5],
        finetune=fp.Continue(),
        training=fp.Training(epochs=2, batchsize=32, decay=0.8),
        engines=(second, "torch"),
    )
    assert result.ok, [d for d in result.differences if not d.ok]
    compared = {d.quantity for d in result.differences}
    assert compared >= {"scores", "masks", "weights after pruning", "compact network", "weights after each step"}
    usual = type(saliency) is fp.Magnitude and type(structure) in (fp.Global, fp.Layerwise)
    assert ("masks of torch.nn.utils.prune" in compared) == usual


@pytest.mark.julia
@pytest.mark.parametrize(
    ("saliency", "structure"),
    [
        (fp.SNIP(per_class=5), fp.Global()),
        (fp.SynFlow(iterations=20), fp.Global()),
        (fp.Magnitude(), fp.Neurons(layerwise=True)),
    ],
)
def test_both_engines_agree_on_lenet5(large_digits: Dataset, saliency: fp.Taylor, structure: fp.Global) -> None:
    result = fp.crosscheck(
        fp.lenet5(engine="julia"),
        large_digits,
        saliency=saliency,
        structure=structure,
        schedule=[0.5, 0.8],
        training=fp.Training(epochs=1),
    )
    assert result.ok, [d for d in result.differences if not d.ok]


def net_of(*parts: Part) -> fp.Network:
    return build(numbered(parts), "torch")


def unit(weight: object, activation: str = "identity", bias: object = None) -> Layer:
    values = np.array(weight, np.float32)
    kind = ConvLayer if values.ndim == 4 else Layer
    return kind("", values, np.ones(values.shape, bool), None if bias is None else np.float32(bias), activation)


def test_samples_near_a_tie_of_max_pooling_are_left_out() -> None:
    pool = Pool("", "max", (2, 2), (2, 2))
    net = net_of(Input((1, 2, 2)), unit([[[[1.0]]]]), pool, Flatten(""), unit([[1.0], [2.0]]))
    x = np.array([[1, 1 - 1e-4, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0.5, 0.5, 0]], np.float32)
    assert off_kinks(net.model, x).tolist() == [False, True, True, True]
    mean = net_of(Input((1, 2, 2)), unit([[[[1.0]]]]), replace(pool, kind="mean"), Flatten(""), unit([[1.0]]))
    assert off_kinks(mean.model, x).all()
    single = net_of(Input((1, 2, 2)), unit([[[[1.0]]]]), replace(pool, size=(1, 1)), Flatten(""), unit([[1.0]]))
    assert off_kinks(single.model, x).all()
    padded = net_of(
        Input((1, 2, 2)), unit([[[[1.0]]]]), replace(pool, padding=(1, 1)), Flatten(""), unit([[1.0] * 4])
    )
    assert off_kinks(padded.model, x).all()  # each window sees one value


def norm(mean: float, activation: str = "relu") -> BatchNorm:
    one = np.ones(1, np.float32)
    return BatchNorm("", one, 0 * one, mean * one, one, activation)


def test_samples_near_the_kink_of_a_normalised_layer_are_left_out() -> None:
    net = net_of(unit([[1.0]]), norm(3), unit([[1.0], [2.0]]))
    x = np.array([[1], [3 + 1e-6], [4], [0]], np.float32)
    assert off_kinks(net.model, x).tolist() == [True, False, True, True]
    smooth = net_of(unit([[1.0]]), norm(3, "tanh"), unit([[1.0], [2.0]]))
    assert off_kinks(smooth.model, x).all()


def of(x: object) -> Dataset:
    samples = np.array(x, np.float32)
    y = np.arange(len(samples)) % 2
    return fp.datasets.arrays(samples, y, samples, y)


def test_a_training_batch_is_clear_of_kinks_with_its_own_statistics() -> None:
    net = net_of(unit([[1.0]]), norm(100), unit([[1.0], [2.0]]))
    data = of([[0], [1], [2.5], [4.5], [2 + 1e-6], [2]])  # the mean of the first five is where the last of them is
    batches = [[0, 1, 2, 3, 4], [0, 3], [4], [0, 1, 2, 3]]
    assert [crosscheck._smooth(net.model, data, np.array(b)).tolist() for b in batches] == [
        [0, 1, 2, 3],
        [0, 3],
        [],
        [0, 1, 2, 3],
    ]
    assert off_kinks(net.model, data.x_train).all()  # at the stored mean there are none


def test_batches_that_are_left_are_clear_of_kinks(monkeypatch: pytest.MonkeyPatch, digits: Dataset) -> None:
    monkeypatch.setattr(crosscheck, "KINK", 3e-3)
    net = fp.vgg((2, "M"), input_shape=(1, 8, 8), engine="torch")
    smooth = crosscheck._smooth(net.model, digits, np.arange(60))
    assert 2 < len(smooth) < 60
    assert crosscheck._away(net.parts, digits.x_train[smooth], training=True).all()


def test_derivatives_without_a_sample_that_is_clear_of_kinks_are_left_out(
    monkeypatch: pytest.MonkeyPatch, digits: Dataset
) -> None:
    net = fp.vgg((2, "M"), input_shape=(1, 8, 8), engine="torch")
    monkeypatch.setattr(crosscheck, "KINK", 10.0)
    options = {"schedule": [0.5], "training": fp.Training(epochs=1), "engines": ("torch", "torch")}
    result = fp.crosscheck(net, digits, **options)  # type: ignore[arg-type]
    quantities = {d.quantity for d in result.differences}
    assert "gradients" not in quantities
    assert "weights after each step" not in quantities


def test_a_bias_that_is_normalised_away_is_not_compared() -> None:
    parts = [unit([[1.0]], bias=[1]), norm(3), unit([[1.0]], "relu", bias=[1]), norm(3), unit([[1.0], [2.0]])]
    names = [len(crosscheck._trained(parts[:n])) for n in range(6)]
    assert names == [0, 2, 1 + 3, 1 + 3 + 2, 1 + 3 + 2 + 4, 1 + 3 + 2 + 4 + 1]


@pytest.mark.parametrize("structure", [fp.Global(), fp.Layerwise()])
def test_masks_of_torch_are_those_of_convolutions(structure: fp.Global) -> None:
    net = fp.vgg((4, "M", 6, "M"), input_shape=(1, 8, 8), engine="torch")
    before = net.copy().layers
    fp.prune(net, sparsity=0.5, structure=structure)
    for one, other in zip(torch_masks(before, 0.5, structure), net.masks, strict=True):
        np.testing.assert_array_equal(one, other)
