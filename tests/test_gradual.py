from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import pyflux_prune as fp
from pyflux_prune import experiment
from pyflux_prune.datasets import Dataset

QUICK = fp.Training(epochs=3, batchsize=32, optimiser=fp.Adam(0.01))
STEPS = 21  # 210 training samples


def arrays(net: fp.Network) -> list[np.ndarray]:
    return [a.copy() for la in net.layers for a in (la.weight, la.mask, la.bias)]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def by_hand(
    net: fp.Network, data: Dataset, training: fp.Training, changes: dict[int, object], seed: int = 0
) -> None:
    """Train step by step; before step t, call what ``changes`` holds for it with the batch that comes next."""
    net.model.start(training.optimiser)
    step = 0
    for epoch in range(training.epochs):
        net.model.adjust(training.eta(epoch))
        order = experiment.batch_order(len(data.y_train), seed, 0, epoch)
        for at in range(0, len(order), training.batchsize):
            part = order[at : at + training.batchsize]
            if step in changes:
                changes[step](part)  # type: ignore[operator]
            net.model.train(data.x_train, data.y_train, part, len(part))
            step += 1


def test_gradual_pruning_prunes_on_the_way_with_the_memory_going_on(engine: str, blobs: Dataset) -> None:
    training = fp.Training(epochs=3, batchsize=32, optimiser=fp.Adam(0.01), decay=0.7)
    net = fp.mlp([6, 12, 3], engine=engine)
    other = net.copy()
    run = fp.gradual_prune(net, blobs, saliency=fp.Taylor(), schedule=[0.3, 0.6], every=5, training=training)
    samples = (blobs.x_train, blobs.y_train)
    prunings = {
        5 * k: lambda _, s=s: other.model.prune(fp.Taylor(), s, fp.Global(), samples)
        for k, s in ((1, 0.3), (2, 0.6))
    }
    by_hand(other, blobs, training, prunings)
    assert same([m.copy() for m in net.masks], [m.copy() for m in other.masks])
    for ours, theirs in zip(net.weights, other.weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert run.baseline is not None
    assert [r.round for r in (run.baseline, *run.rounds)] == [0, 1, 2]
    assert [r.nonzero for r in (run.baseline, *run.rounds)] == [108, 108 - 32, 108 - 65]
    assert run.rounds[-1].accuracy == (net.predict(blobs.x_test) == blobs.y_test).mean()
    assert run.plan.every == 5


def test_prunings_share_the_training_by_default(blobs: Dataset) -> None:
    run = fp.gradual_prune(
        fp.mlp([6, 12, 3], engine="torch"), blobs, schedule=fp.Polynomial(0.6, 4), training=QUICK
    )
    assert run.plan.every == STEPS // 5
    assert run.rounds[-1].sparsity == pytest.approx(0.6, abs=0.01)
    assert run.rounds[-1].accuracy > 0.6


def test_a_gradual_run_is_saved_but_not_resumed(blobs: Dataset, tmp_path: Path) -> None:
    net = fp.mlp([6, 12, 3], engine="torch")
    run = fp.gradual_prune(net, blobs, schedule=[0.5], training=QUICK)
    run.save(tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["plan"]["every"] == 10
    assert (tmp_path / "run" / "curve.png").is_file()
    with pytest.raises(fp.InvalidInput, match="gradual_prune"):
        fp.resume(tmp_path / "run", blobs)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"every": 7, "schedule": [0.1, 0.2, 0.3]}, ["3 prunings", "every 7 steps", "21 steps"]),
        ({"schedule": fp.Polynomial(0.8, 21)}, ["21 prunings", "21 steps"]),
        ({"training": fp.Training(epochs=0)}, ["0 steps"]),
        ({"every": 0}, ["every", "0"]),
        ({"every": 1.5}, ["every", "1.5"]),
        ({"schedule": [0.5, 0.4]}, ["never go down"]),
        ({"schedule": [(0.5, 0.5)]}, ["sparsity"]),
        ({"structure": fp.NofM()}, ["layer 0"]),
        ({"saliency": fp.Redundancy()}, ["Neurons"]),
        ({"training": "long"}, ["training", "'long'"]),
        ({"seed": -1}, ["seed"]),
        ({"data": "digits"}, ["data", "'digits'"]),
    ],
)
def test_a_bad_gradual_plan_trains_nothing(blobs: Dataset, arguments: dict[str, object], names: list[str]) -> None:
    net = fp.mlp([6, 12, 3], engine="torch")
    before = arrays(net)
    with pytest.raises(fp.InvalidInput) as caught:
        fp.gradual_prune(net, **({"data": blobs, "training": QUICK, "schedule": [0.5]} | arguments))  # type: ignore[arg-type]
    for name in names:
        assert name in str(caught.value)
    assert same(before, arrays(net))


def sparse(engine: str) -> fp.Network:
    return fp.prune(fp.mlp([6, 12, 3], engine=engine), fp.RandomSaliency(), sparsity=0.7, structure=fp.Layerwise())


@pytest.mark.parametrize("method", [fp.RigL(0.5), fp.SET(0.5)])
def test_sparse_training_moves_weights_and_keeps_the_sparsity(
    engine: str, blobs: Dataset, method: fp.RigL
) -> None:
    net = sparse(engine)
    densities, before = [la.density for la in net.layers], [m.copy() for m in net.masks]
    done = fp.sparse_train(net, blobs, method=method, every=4, training=QUICK)
    assert [la.density for la in net.layers] == densities
    assert any((a != b).any() for a, b in zip(before, net.masks, strict=True))
    assert all((la.weight[~la.mask] == 0).all() for la in net.layers)
    assert done.sparsity == pytest.approx(net.sparsity)
    assert done.accuracy == (net.predict(blobs.x_test) == blobs.y_test).mean()
    again = sparse(engine)
    assert fp.sparse_train(again, blobs, method=method, every=4, training=QUICK).loss == done.loss
    assert same(arrays(net), arrays(again))


def test_weights_grow_at_the_times_and_shares_of_the_paper(
    engine: str, blobs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = fp.Training(epochs=3, batchsize=32, optimiser=fp.Momentum(0.05), decay=0.7)
    net, other = sparse(engine), sparse(engine)
    calls: list[float] = []
    regrow = net.model.regrow
    monkeypatch.setattr(
        net.model,
        "regrow",
        lambda method, fraction, data: (calls.append(fraction), regrow(method, fraction, data)),
    )
    fp.sparse_train(net, blobs, every=5, stop=0.75, training=training, seed=2)
    fractions = {t: 0.15 * (1 + math.cos(math.pi * t / (0.75 * STEPS))) for t in (5, 10, 15)}
    assert calls == pytest.approx(list(fractions.values()))

    def grow(part: np.ndarray, share: float) -> None:
        other.model.regrow(fp.RigL(), share, (blobs.x_train[part], blobs.y_train[part]))

    by_hand(other, blobs, training, {t: lambda part, f=f: grow(part, f) for t, f in fractions.items()}, seed=2)
    assert all((a == b).all() for a, b in zip(net.masks, other.masks, strict=True))
    for ours, theirs in zip(net.weights, other.weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_random_method_draws_anew_each_time(blobs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def seeds(method: fp.SET, seed: int) -> list[int]:
        net, drawn = sparse("torch"), []
        regrow = net.model.regrow
        monkeypatch.setattr(
            net.model, "regrow", lambda m, fraction, data: (drawn.append(m.seed), regrow(m, fraction, data))
        )
        fp.sparse_train(net, blobs, method=method, every=4, training=QUICK, seed=seed)
        return drawn

    first = seeds(fp.SET(seed=1), 0)
    assert len(set(first)) == 3
    assert first == seeds(fp.SET(seed=1), 0)
    assert not set(first) & {*seeds(fp.SET(seed=2), 0), *seeds(fp.SET(seed=1), 1)}


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"net": "net"}, ["net", "'net'"]),
        ({"data": "digits"}, ["data", "'digits'"]),
        ({"method": "rigl"}, ["method", "SET or RigL", "'rigl'"]),
        ({"every": 16}, ["every", "15.75", "16"]),
        ({"every": 0}, ["every", "0"]),
        ({"stop": 1.5}, ["stop", "1.5"]),
        ({"seed": -1}, ["seed"]),
        ({"training": fp.Adam()}, ["training"]),
    ],
)
def test_bad_sparse_training_changes_nothing(
    blobs: Dataset, arguments: dict[str, object], names: list[str]
) -> None:
    net = sparse("torch")
    before = arrays(net)
    with pytest.raises(fp.InvalidInput) as caught:
        fp.sparse_train(**({"net": net, "data": blobs, "every": 4, "training": QUICK} | arguments))  # type: ignore[arg-type]
    for name in names:
        assert name in str(caught.value)
    assert same(before, arrays(net))


def test_a_dense_network_has_no_places_to_grow(blobs: Dataset) -> None:
    with pytest.raises(fp.InvalidInput, match="net must be sparse"):
        fp.sparse_train(fp.mlp([6, 3], engine="torch"), blobs, every=4, training=QUICK)


def test_progress_of_one_training(blobs: Dataset, capfd: pytest.CaptureFixture[str]) -> None:
    fp.gradual_prune(fp.mlp([6, 3], engine="torch"), blobs, schedule=[0.5], training=QUICK, progress=True)
    fp.sparse_train(sparse("torch"), blobs, every=4, training=QUICK, progress=True)
    assert capfd.readouterr().out == ""
