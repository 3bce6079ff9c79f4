from __future__ import annotations

import numpy as np
import pytest

import pyflux_prune as fp
from pyflux_prune.crosscheck import apart
from pyflux_prune.datasets import Dataset

QUICK = fp.Training(epochs=6, batchsize=32)


@pytest.mark.julia
@pytest.mark.parametrize(
    "optimiser",
    [fp.Descent(0.1), fp.Momentum(), fp.Nesterov(), fp.Adam(1.2e-3), fp.AdamW(lambda_=0.1), fp.RMSProp()],
)
def test_both_engines_agree_with_every_optimiser(blobs: Dataset, optimiser: fp.Adam) -> None:
    training = fp.Training(epochs=6, batchsize=32, optimiser=optimiser)
    result = fp.crosscheck(fp.mlp([6, 12, 3], engine="torch"), blobs, schedule=[0.5, 0.8], training=training)
    assert result.ok, [d for d in result.differences if not d.ok]


@pytest.mark.julia
@pytest.mark.parametrize("structure", [fp.Global(), fp.Layerwise()])
@pytest.mark.parametrize("finetune", [fp.Continue(), fp.Rewind(), fp.Rewind(7), fp.Reinitialize(), None])
def test_both_engines_agree_on_every_structure_and_restart(
    blobs: Dataset, structure: fp.Global, finetune: fp.Rewind
) -> None:
    net = fp.mlp([6, 12, 8, 3], activation="tanh", engine="torch")
    result = fp.crosscheck(
        net, blobs, structure=structure, finetune=finetune, schedule=[0.3, 0.6, 0.9], training=QUICK
    )
    assert result.ok, [d for d in result.differences if not d.ok]
    masks = [d for d in result.differences if d.quantity.startswith("masks")]
    assert len(masks) == 6
    assert all(d.value == 0 for d in masks)
    assert net.sparsity == 0


@pytest.mark.julia
def test_the_first_100_adam_steps_on_digits_agree() -> None:
    net = fp.mlp([64, 300, 100, 10], engine="julia")
    training = fp.Training(epochs=5, optimiser=fp.Adam(1.2e-3))
    result = fp.crosscheck(net, fp.datasets.digits(), schedule=fp.Exponential(0.5, 3), training=training)
    assert result.ok, [d for d in result.differences if not d.ok]
    forward = [d.value for d in result.differences if d.quantity == "forward"]
    assert len(forward) == 4
    assert max(forward) < 1e-5


@pytest.mark.julia
def test_random_saliency_is_not_compared_but_the_rest_is(blobs: Dataset) -> None:
    net = fp.mlp([6, 12, 3], engine="torch")
    result = fp.crosscheck(net, blobs, saliency=fp.RandomSaliency(1), schedule=[0.5], training=QUICK)
    assert result.ok
    assert not any("masks" in d.quantity or "scores" in d.quantity for d in result.differences)


def test_a_difference_is_found(blobs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second engine gets everything a little wrong, one quantity at a time."""
    from pyflux_prune.engines.torch import TorchEngine, TorchModel

    class Wrong(TorchModel):
        def forward(self, x):  # type: ignore[no-untyped-def]
            return super().forward(x) * 1.001

        def scores(self, saliency):  # type: ignore[no-untyped-def]
            return [s + 1e-3 for s in super().scores(saliency)]

        def prune(self, saliency, sparsity, structure):  # type: ignore[no-untyped-def]
            super().prune(fp.RandomSaliency(), sparsity, structure)

        def loss_and_gradients(self, x, y):  # type: ignore[no-untyped-def]
            loss, gradients = super().loss_and_gradients(x, y)
            return loss + 1e-2, [(w * 1.01, b) for w, b in gradients]

    class WrongEngine(TorchEngine):
        def build(self, layers):  # type: ignore[no-untyped-def]
            return Wrong(layers)

    import sys

    module = sys.modules["pyflux_prune.crosscheck"]
    monkeypatch.setattr(module, "get_engine", lambda name: {"right": TorchEngine, "wrong": WrongEngine}[name]())
    result = fp.crosscheck(
        fp.mlp([6, 12, 3], engine="torch"), blobs, schedule=[0.5], training=QUICK, engines=("right", "wrong")
    )
    assert not result.ok
    wrong = {d.quantity for d in result.differences if not d.ok}
    assert wrong >= {"forward", "loss", "gradients", "scores", "masks"}
    assert "loss of each step" not in {d.quantity for d in result.differences if d.round == 0 and not d.ok}


def test_nan_is_never_within_tolerance() -> None:
    from pyflux_prune.crosscheck import Difference

    assert np.isnan(apart([np.array([np.nan])], [np.array([1.0])]))
    assert not Difference(0, "forward", float("nan"), 1.0).ok
