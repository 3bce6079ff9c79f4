"""Every experiment on networks of convolutions, normalisation and pooling."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from any_networks import assert_same

import pyflux_prune as fp
from pyflux_prune import experiment, rundir
from pyflux_prune.datasets import Dataset
from pyflux_prune.engines.parts import BatchNorm, Part, arrays, copies

QUICK = fp.Training(epochs=2, batchsize=30, optimiser=fp.Adam(0.01))


@pytest.fixture(scope="module")
def digits() -> Dataset:
    """A few of the digits, 8 × 8."""
    data = fp.datasets.digits()
    assert data.shape == (1, 8, 8)
    x, y = data.x_train[:240].reshape(240, 1, 8, 8), data.y_train[:240]
    return fp.datasets.arrays(x, y, data.x_test[:60], data.y_test[:60], name="few digits")


def tiny(engine: str, **options: Any) -> fp.Network:
    return fp.vgg((4, "M", 6, "M"), (10,), input_shape=(1, 8, 8), engine=engine, **options)


def norms(parts: list[Part]) -> list[np.ndarray]:
    """What batch normalisation holds."""
    return [a.copy() for part in parts if isinstance(part, BatchNorm) for a in arrays(part).values()]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_run_trains_and_prunes(engine: str, digits: Dataset) -> None:
    net = fp.vgg((8, "M", 8, "M"), (20,), input_shape=(1, 8, 8), engine=engine)
    before = norms(net.parts)
    training = fp.Training(epochs=12, batchsize=30, optimiser=fp.Adam(0.01))
    run = fp.iterative_prune(net, digits, schedule=[0.3, 0.6], training=training)
    assert run.baseline is not None
    assert run.baseline.accuracy > 0.6  # over seeds and engines, 0.80 to 0.93
    assert run.rounds[-1].accuracy > 0.6  # 0.73 to 0.93
    assert run.rounds[-1].sparsity == pytest.approx(0.6, abs=1e-3)
    assert run.parameters == 8 * 9 + 8 * 8 * 9 + 2 * (8 + 8) + 32 * 20 + 20 + 20 * 10 + 10
    assert not any(np.array_equal(a, b) for a, b in zip(before, norms(net.parts), strict=True))
    assert all((la.weight[~la.mask] == 0).all() for la in net.layers)


@pytest.mark.parametrize("finetune", [fp.Continue(), fp.Rewind(), fp.Rewind(5), fp.Reinitialize(), None])
def test_what_survivors_restart_from(engine: str, digits: Dataset, finetune: fp.Rewind) -> None:
    net = tiny(engine)
    plan = experiment.Plan(fp.Magnitude(), fp.Global(), (0.5,), finetune, QUICK, 0)
    initial = copies(net.parts)
    run = experiment.begin(net, digits, plan)
    advance = experiment.advance(run, digits, [])
    origin, trained = next(advance), copies(net.parts)
    net.model.prune(fp.Magnitude(), 0.5, fp.Global())
    experiment.restart(net.model, plan, origin, 1)
    masks = net.masks
    assert sum(int(m.sum()) for m in masks) == round(0.5 * sum(m.size for m in masks))
    if isinstance(finetune, fp.Rewind | fp.Reinitialize):
        assert same(norms(net.parts), norms(origin))
        assert same(norms(origin), norms(initial)) == (finetune != fp.Rewind(5))
    else:
        assert same(norms(net.parts), norms(trained))
    layers = fp.Network(net.model).layers
    if isinstance(finetune, fp.Reinitialize):
        limit = np.sqrt(6 / ((4 + 6) * 9))
        assert limit / 2 < np.abs(layers[1].weight).max() <= limit
        assert not np.array_equal(layers[1].weight, initial[4].weight * layers[1].mask)  # type: ignore[union-attr]


def test_a_killed_run_resumes_to_the_same_numbers(
    engine: str, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"schedule": [0.3, 0.6], "training": QUICK, "finetune": fp.Rewind(3)}
    whole = fp.iterative_prune(tiny(engine), digits, out=tmp_path / "whole", **options)
    write = rundir.write

    def die(folder: Path, record: dict[str, Any], *parts: Any) -> None:
        write(folder, record, *parts)
        if len(record["rounds"]) == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rundir, "write", die)
        with pytest.raises(KeyboardInterrupt):
            fp.iterative_prune(tiny(engine), digits, out=tmp_path / "cut", **options)
    resumed = fp.resume(tmp_path / "cut", digits)
    assert_same(resumed.network.parts, whole.network.parts)
    assert [r.loss for r in resumed.rounds] == [r.loss for r in whole.rounds]
    assert_same(fp.Network.load(tmp_path / "cut" / rundir.MODEL, engine).parts, whole.network.parts)
    whole.save(tmp_path / "saved")
    assert_same(fp.Network.load(tmp_path / "saved" / rundir.MODEL, engine).parts, whole.network.parts)


@pytest.mark.parametrize(
    ("saliency", "structure"),
    [
        (fp.Magnitude(scaled=True), fp.ERK()),
        (fp.Threshold(), fp.Layerwise()),
        (fp.Taylor(), fp.Global()),
        (fp.SNIP(per_class=5), fp.Global()),
        (fp.GraSP(per_class=5), fp.Global(min_kept=2)),
        (fp.SynFlow(iterations=10), fp.Global()),
        (fp.OBS(iterations=2), fp.Layerwise()),
        (fp.Wanda(), fp.PerOutput()),
        (fp.Movement(fp.Training(epochs=1)), fp.NofM(1, 2)),
        (fp.EdgePopup(0.5, fp.Training(epochs=1)), fp.Layerwise()),
        (fp.RandomSaliency(), fp.Layerwise()),
        (fp.Magnitude(), fp.Neurons(layerwise=True)),
        (fp.Activation(), fp.Neurons(layerwise=True)),
    ],
)
def test_every_criterion_prunes_images(
    engine: str, digits: Dataset, saliency: fp.Taylor, structure: fp.Global
) -> None:
    if isinstance(structure, fp.NofM):
        structure = fp.NofM(1, 2, exclude=0)  # of one input channel
    run = fp.iterative_prune(
        tiny(engine), digits, saliency=saliency, structure=structure, schedule=[0.5], training=QUICK
    )
    assert run.rounds[-1].nonzero < run.parameters
    small = run.network.compact()
    np.testing.assert_allclose(small(digits.x_test), run.network(digits.x_test), rtol=1e-3, atol=1e-4)


def test_gradual_pruning_and_sparse_training(engine: str, digits: Dataset) -> None:
    run = fp.gradual_prune(tiny(engine), digits, schedule=[0.3, 0.5, 0.7], training=QUICK)
    assert run.network.sparsity == pytest.approx(0.7, abs=1e-3)
    net = fp.prune(tiny(engine), fp.RandomSaliency(), sparsity=0.5, structure=fp.ERK())
    before = [mask.copy() for mask in net.masks]
    fp.sparse_train(net, digits, every=4, training=QUICK)
    assert net.sparsity == pytest.approx(0.5, abs=2e-3)
    assert not same(before, net.masks)


def test_sensitivity_of_each_layer(engine: str, digits: Dataset) -> None:
    net = tiny(engine)
    parts = copies(net.parts)
    result = fp.sensitivity(net, digits, rates=(0.3, 0.9))
    assert result.layers == ("0", "4", "9", "11")
    assert result.accuracy.shape == (4, 2)
    assert_same(net.parts, parts)


def test_a_lottery_ticket_of_a_network_made_with_each_seed(engine: str, digits: Dataset) -> None:
    made = []

    def make(seed: int) -> fp.Network:
        made.append(tiny(engine, seed=seed))
        return made[-1]

    result = fp.lottery_ticket(make, digits, schedule=[0.3, 0.6], training=QUICK, seeds=(4, 5))
    assert result.seeds == (4, 5)
    assert [r.density for r in result.rounds] == pytest.approx([0.7, 0.4], abs=2e-3)
    assert not np.array_equal(made[0].weights[0], made[1].weights[0])
    with pytest.raises(fp.InvalidInput, match="net must be Network, not None"):
        fp.lottery_ticket(lambda seed: None, digits, schedule=[0.5])  # type: ignore[arg-type,return-value]


def normalised(engine: str) -> fp.Network:
    """A perceptron whose hidden layer is normalised."""
    torch = pytest.importorskip("torch")
    nn = torch.nn
    return fp.from_torch(
        nn.Sequential(nn.Linear(64, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 10)), engine=engine
    )


def test_batches_of_one_are_refused_where_they_cannot_be_normalised(engine: str, digits: Dataset) -> None:
    net = normalised(engine)
    before = copies(net.parts)
    one = fp.Training(epochs=1, batchsize=239)  # 240 samples
    message = "batchsize 239 makes a batch of one of 240 samples, but layer 1, which normalises batches, needs two"
    movement = {"saliency": fp.Movement(one)}
    for whose, act in (
        ("training's", lambda: fp.iterative_prune(net, digits, schedule=[0.5], training=one)),
        ("training's", lambda: fp.gradual_prune(net, digits, schedule=[0.5], every=1, training=one)),
        ("training's", lambda: fp.sparse_train(net, digits, training=one)),
        ("Movement's", lambda: fp.iterative_prune(net, digits, schedule=[0.5], training=QUICK, **movement)),
        ("Movement's", lambda: fp.gradual_prune(net, digits, schedule=[0.5], training=QUICK, **movement)),
        ("Movement's", lambda: fp.prune(net, sparsity=0.5, data=digits, **movement)),
        ("Movement's", lambda: fp.sensitivity(net, digits, **movement)),
        ("Movement's", lambda: net.model.scores(fp.Movement(one), (digits.x_train, digits.y_train))),
    ):
        with pytest.raises(fp.InvalidInput, match=f"^{whose} {message}"):
            act()
    assert_same(net.parts, before)
    fp.prune(net, fp.EdgePopup(0.5, one), sparsity=0.1, data=digits)  # which uses the stored statistics
    fp.iterative_prune(net, digits, schedule=[0.5], training=QUICK)
    fp.iterative_prune(tiny(engine), digits, schedule=[0.5], training=one)  # of images: 64 values in each channel


def test_images_must_fit_the_network(digits: Dataset) -> None:
    with pytest.raises(fp.InvalidInput, match=r"samples of the shape \(1, 8, 8\), but net takes \(4, 4, 4\)"):
        fp.iterative_prune(fp.vgg((4,), input_shape=(4, 4, 4), engine="torch"), digits)
    flat = fp.datasets.arrays(digits.x_train, digits.y_train, digits.x_test, digits.y_test)
    assert flat.shape is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.iterative_prune(tiny("torch"), flat, schedule=[0.5], training=fp.Training(epochs=0))


def test_the_record_of_a_run_names_its_layers(digits: Dataset, tmp_path: Path) -> None:
    fp.iterative_prune(tiny("torch"), digits, schedule=[0.5], training=QUICK, out=tmp_path / "run")
    record = json.loads((tmp_path / "run" / rundir.RECORD).read_text())
    assert [layer["name"] for layer in record["rounds"][0]["layers"]] == ["0", "4", "9", "11"]
    assert "density 11" in (tmp_path / "run" / rundir.TABLE).read_text()
