from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import pyflux_prune as fp
from pyflux_prune.datasets import Dataset

TRAINING = fp.Training(epochs=6, batchsize=32, optimiser=fp.Adam(0.01))


def trained(data: Dataset, engine: str = "torch") -> fp.Network:
    net = fp.mlp([6, 12, 3], engine=engine)
    fp.iterative_prune(net, data, schedule=[0.0], finetune=None, training=TRAINING)
    return net


def accuracy(net: fp.Network, data: Dataset) -> float:
    return float((net.predict(data.x_test) == data.y_test).mean())


@pytest.mark.parametrize("saliency", [fp.Magnitude(), fp.Taylor()])
def test_each_layer_is_pruned_alone(engine: str, blobs: Dataset, saliency: fp.Taylor) -> None:
    net = trained(blobs, engine)
    before = [la.weight.copy() for la in net.layers]
    found = fp.sensitivity(net, blobs, saliency=saliency, rates=(0.0, 0.5, 0.9))
    assert found.layers == ("0", "2")
    assert found.baseline == accuracy(net, blobs)
    assert found.accuracy.shape == (2, 3)
    assert (found.accuracy[:, 0] == found.baseline).all()
    for i in range(2):
        other = net.copy()
        fp.prune(other, saliency, sparsity=0.9, structure=fp.Layerwise(exclude=(1 - i,)), data=blobs)
        assert found.accuracy[i, 2] == accuracy(other, blobs)
        assert other.masks[1 - i].all()
    assert net.sparsity == 0
    assert all((a == la.weight).all() for a, la in zip(before, net.layers, strict=True))


def result(accuracy: list[list[float]], pruned: tuple[float, ...] = (0.0, 0.1)) -> fp.Sensitivity:
    return fp.Sensitivity("blobs", ("0", "2"), (0.2, 0.5, 0.9), np.array(accuracy), 0.9, pruned)


def test_sparsities_go_as_far_as_accuracy_stays() -> None:
    found = result([[0.9, 0.89, 0.5], [0.85, 0.9, 0.9]])
    assert found.sparsities() == (0.5, 0.1)
    assert found.sparsities(0.0) == (0.2, 0.1)
    assert found.sparsities(loss=0.05) == (0.5, 0.9)
    with pytest.raises(fp.InvalidInput, match="loss"):
        found.sparsities(-1)


def test_the_sparsities_found_can_be_pruned_to(blobs: Dataset) -> None:
    net = trained(blobs)
    found = fp.sensitivity(net, blobs)
    fp.prune(net, sparsity=found.sparsities(), structure=fp.Layerwise())
    assert [la.sparsity for la in net.layers] == pytest.approx(found.sparsities(), abs=0.02)


def test_the_result_as_table_plot_and_json(tmp_path: Path) -> None:
    found = result([[0.9, 0.89, 0.5], [0.85, 0.9, 0.9]])
    assert found.table().row_count == 2
    assert json.loads(json.dumps(found.to_json()))["accuracy"][0] == [0.9, 0.89, 0.5]
    found.plot(tmp_path / "layers.svg")
    assert "<svg" in (tmp_path / "layers.svg").read_text()
    with pytest.raises(fp.InvalidInput, match="plot"):
        found.plot(tmp_path / "layers.nonsense")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"rates": ()}, ["rates", "()"]),
        ({"rates": 0.5}, ["rates", "0.5"]),
        ({"rates": (0.5, 0.2)}, ["rates", "go up"]),
        ({"rates": (0.5, 1.0)}, ["rates", "1.0"]),
        ({"rates": (0.1, 0.5)}, ["0.1", "already"]),
        ({"saliency": fp.Activation()}, ["Neurons", "Activation"]),
        ({"saliency": fp.SNIP(per_class=500), "rates": (0.9,)}, ["500"]),
        ({"saliency": "magnitude"}, ["saliency", "'magnitude'"]),
        ({"data": "digits"}, ["data", "'digits'"]),
        ({"net": "net"}, ["net", "'net'"]),
    ],
)
def test_bad_arguments_are_named(blobs: Dataset, arguments: dict[str, object], names: list[str]) -> None:
    net = fp.prune(fp.mlp([6, 12, 3], engine="torch"), sparsity=0.4)
    with pytest.raises(fp.InvalidInput) as caught:
        fp.sensitivity(**({"net": net, "data": blobs} | arguments))  # type: ignore[arg-type]
    for name in names:
        assert name in str(caught.value)
