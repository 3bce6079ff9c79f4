from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pyflux_prune as fp
from pyflux_prune import choices
from pyflux_prune.crosscheck import apart, off_kinks
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
@pytest.mark.parametrize(
    ("structure", "finetune"),
    [
        (fp.Global(), fp.Continue()),
        (fp.Layerwise(), fp.Rewind()),
        (fp.Global(), fp.Rewind(7)),
        (fp.Layerwise(), fp.Reinitialize()),
        (fp.Layerwise(), None),
    ],
)
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


EACH = [
    *(
        (criterion, fp.Layerwise())
        for criterion in (fp.Magnitude(scaled=True), fp.Threshold(), fp.RandomSaliency())
    ),
    *((criterion, fp.Global()) for criterion in (fp.Taylor(), fp.Taylor(squared=False, batchsize=50), fp.SNIP())),
    (fp.GraSP(), fp.Global(min_kept=2)),
    (fp.SynFlow(iterations=20), fp.Global()),
    (fp.OBD(), fp.ERK()),
    (fp.OBD(exact=True), fp.PerOutput()),
    (fp.OBS(), fp.Layerwise(exclude=-1)),
    (fp.OBS(full=True, iterations=2), fp.Global()),
    (fp.Wanda(), fp.PerOutput()),
    (fp.Movement(fp.Training(epochs=2, decay=0.5)), fp.NofM(2, 6)),
    (fp.EdgePopup(0.5, fp.Training(epochs=3)), fp.Layerwise()),
    (fp.Magnitude(), fp.Neurons(norm=2)),
    (fp.Activation(), fp.Neurons()),
    (fp.Activation(zeros=True), fp.Neurons(layerwise=True)),
    (fp.Redundancy(), fp.Neurons(min_kept=2)),
    (fp.Redundancy(activations=True), fp.Neurons()),
]


@pytest.mark.parametrize(
    ("second", "pretrain"), [pytest.param("julia", False, marks=pytest.mark.julia), ("torch", True)]
)
@pytest.mark.parametrize(("saliency", "structure"), EACH)
def test_both_engines_agree_on_every_criterion(
    blobs: Dataset, saliency: fp.Taylor, structure: fp.Global, pretrain: bool, second: str
) -> None:
    result = fp.crosscheck(
        fp.mlp([6, 12, 6, 3], engine="torch"),
        blobs,
        saliency=saliency,
        structure=structure,
        schedule=[0.25, 0.5],
        finetune=fp.Continue(),
        training=fp.Training(epochs=3, batchsize=32, decay=0.8),
        pretrain=pretrain,
        engines=(second, "torch"),
    )
    assert result.ok, [d for d in result.differences if not d.ok]
    compared = {d.quantity for d in result.differences}
    assert "compact network" in compared
    assert ({"scores", "masks", "weights after pruning"} <= compared) == (not saliency.random)


@pytest.mark.julia
@pytest.mark.parametrize("activations", [False, True])
def test_engines_agree_on_neurons_that_go_with_those_they_lead_to(activations: bool) -> None:
    data = fp.datasets.arrays(np.random.default_rng(0).normal(size=(66, 64)), np.arange(66) % 3)
    options: Any = {
        "saliency": fp.Redundancy(activations),
        "structure": fp.Neurons(),
        "schedule": [0.6],
        "finetune": None,
        "training": fp.Training(epochs=1),
    }
    led = 0
    for seed in range(6):
        net = fp.prune(fp.mlp([64, 8, 6, 3], seed=seed, engine="torch"), sparsity=0.2)
        result = fp.crosscheck(net, data, **options)
        assert result.ok, [d for d in result.differences if not d.ok]
        fp.prune(net, options["saliency"], sparsity=0.6, structure=fp.Neurons(), data=data)
        led += int((net.masks[0].any(1) & ~net.masks[1].any(0)).sum())
    assert led


def test_all_criteria_and_structures_are_compared() -> None:
    assert {type(saliency) for saliency, _ in EACH} == set(choices.SALIENCIES.values())
    assert {type(structure) for _, structure in EACH} == set(choices.STRUCTURES.values())


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

        def scores(self, saliency, data=None):  # type: ignore[no-untyped-def]
            return [s + 1e-3 for s in super().scores(saliency, data)]

        def prune(self, saliency, sparsity, structure, data=None):  # type: ignore[no-untyped-def]
            super().prune(fp.RandomSaliency(), sparsity, structure)

        def compact(self):  # type: ignore[no-untyped-def]
            small = super().compact()
            small.layers()[-1].bias[:] += 1
            return small

        def loss_and_gradients(self, x, y):  # type: ignore[no-untyped-def]
            loss, gradients = super().loss_and_gradients(x, y)
            return loss + 1e-2, [(w * 1.01, b) for w, b in gradients]

    class WrongEngine(TorchEngine):
        def build(self, layers):  # type: ignore[no-untyped-def]
            return Wrong(layers)

    import sys

    module = sys.modules["pyflux_prune.crosscheck"]
    engines = {"torch": TorchEngine, "wrong": WrongEngine}
    monkeypatch.setattr(module, "get_engine", lambda name: engines[name]())
    result = fp.crosscheck(
        fp.mlp([6, 12, 3], engine="torch"), blobs, schedule=[0.5], training=QUICK, engines=("torch", "wrong")
    )
    assert not result.ok
    wrong = {d.quantity for d in result.differences if not d.ok}
    assert wrong >= {"forward", "loss", "gradients", "scores", "masks", "weights after pruning", "compact network"}
    assert "loss of each step" not in {d.quantity for d in result.differences if d.round == 0 and not d.ok}


@pytest.mark.julia
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_steps_stay_together_where_relus_have_a_slope(seed: int) -> None:
    net = fp.mlp([64, 300, 100, 10], seed=seed, engine="torch")
    training = fp.Training(epochs=5, optimiser=fp.Adam(1.2e-3))
    result = fp.crosscheck(net, fp.datasets.digits(), schedule=[0.3, 0.6, 0.9], training=training, seed=seed)
    assert result.ok, [d for d in result.differences if not d.ok]


def test_samples_near_a_kink_are_left_out() -> None:
    net = fp.mlp([2, 3, 2], engine="torch")
    net.layers[0].weight[:] = [[1, 0], [0, 1], [0, 0]]
    x = np.array([[1, 1], [1, 1e-7], [-1e-7, 1], [0, 1], [-1, 1]], np.float32)
    assert off_kinks(net.model, x).tolist() == [True, False, False, True, True]
    assert not off_kinks(net.model, x[1:3]).any()
    smooth = fp.mlp([2, 3, 2], activation="tanh", engine="torch")
    assert off_kinks(smooth.model, x).all()


def test_nan_is_never_within_tolerance() -> None:
    from pyflux_prune.crosscheck import Difference

    assert np.isnan(apart([np.array([np.nan])], [np.array([1.0])]))
    assert not Difference(0, "forward", float("nan"), 1.0).ok


def test_infinities_must_be_the_same() -> None:
    ends, other = np.array([1.0, np.inf]), np.array([np.inf, 1.0])
    assert apart([ends], [ends]) == 0
    assert apart([ends], [other]) == np.inf
    assert apart([np.array([1.5, np.inf])], [ends]) == 0.5
