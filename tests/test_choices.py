from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyflux_prune as fp
from pyflux_prune import choices


def test_schedules_follow_their_equations() -> None:
    assert choices.sparsities(fp.OneShot(0.8)) == [0.8]
    assert choices.sparsities(fp.Constant(0.1, 3)) == pytest.approx([0.1, 0.2, 0.3])
    assert choices.sparsities(fp.Exponential(0.2, 3)) == pytest.approx([0.2, 0.36, 0.488])
    assert choices.sparsities(fp.Polynomial(0.9, 4)) == pytest.approx(
        [0.9 * (1 - t**3) for t in (0.75, 0.5, 0.25, 0)]
    )
    assert choices.sparsities([0.1, 0.1, 0.5]) == [0.1, 0.1, 0.5]
    assert choices.sparsities(np.array([0.1, 0.5])) == [0.1, 0.5]


def test_a_schedule_may_have_one_rate_per_layer() -> None:
    first, second = choices.sparsities(fp.Exponential((0.2, 0.1), 2))
    assert first == pytest.approx((0.2, 0.1))
    assert second == pytest.approx((0.36, 0.19))


@given(rate=st.floats(0, 0.9), rounds=st.integers(1, 12), power=st.floats(0.1, 5))
def test_schedules_never_go_down_and_stay_below_one(rate: float, rounds: int, power: float) -> None:
    for schedule in (
        fp.Exponential(rate, rounds),
        fp.Constant(rate / rounds, rounds),
        fp.Polynomial(rate, rounds, power),
    ):
        targets = choices.sparsities(schedule)
        assert len(targets) == rounds
        assert all(0 <= s < 1 for s in targets)
        assert targets == sorted(targets)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: fp.OneShot(1.0), ["sparsity", "1.0", "[0, 1)"]),
        (lambda: fp.OneShot(float("nan")), ["sparsity", "nan"]),
        (lambda: fp.OneShot("much"), ["sparsity", "'much'"]),
        (lambda: fp.OneShot([]), ["sparsity", "[]"]),
        (lambda: fp.Exponential(-0.1, 3), ["rate", "-0.1"]),
        (lambda: fp.Exponential(0.1, 0), ["rounds", "at least 1", "0"]),
        (lambda: fp.Exponential(0.1, 1.5), ["rounds", "1.5"]),
        (lambda: fp.Constant(0.4, 3), ["rate × rounds", "0.4"]),
        (lambda: fp.Polynomial(0.5, 3, power=0), ["power", "0"]),
        (lambda: fp.Rewind(-1), ["to", "-1"]),
        (lambda: fp.Adam(0), ["eta", "0"]),
        (lambda: fp.Adam(beta=(0.9,)), ["beta", "two numbers"]),
        (lambda: fp.AdamW(lambda_=-1), ["lambda", "-1"]),
        (lambda: fp.Momentum(rho=1.0), ["rho", "1.0"]),
        (lambda: fp.Training(epochs=-1), ["epochs", "-1"]),
        (lambda: fp.Training(batchsize=0), ["batchsize", "0"]),
        (lambda: fp.Training(optimiser="adam"), ["optimiser", "'adam'"]),
        (
            lambda: fp.prune(fp.mlp([2, 2], engine="torch"), choices.Saliency(), sparsity=0.5),
            ["Magnitude or Random"],
        ),
        (lambda: fp.RandomSaliency(seed=-1), ["seed", "-1"]),
        (lambda: choices.sparsities([0.5, 0.4]), ["never go down", "0.4", "0.5"]),
        (lambda: choices.sparsities([(0.5, 0.5), (0.6, 0.4)]), ["never go down"]),
        (lambda: choices.sparsities([]), ["at least one"]),
        (lambda: choices.sparsities("steep"), ["schedule", "'steep'"]),
        (lambda: choices.sparsities([0.5, 1.5]), ["1.5"]),
        (lambda: choices.sparsities(fp.Exponential(0.97, 20)), ["sparsity", "1.0"]),
        (lambda: choices.schedule_by_name("steep", None, None), ["oneshot", "'steep'"]),
        (lambda: choices.schedule_by_name("oneshot", 0.5, 3), ["rounds", "3"]),
        (lambda: choices.finetune_by_name("rewind:x"), ["rewind:STEP", "'rewind:x'"]),
        (lambda: choices.finetune_by_name("again"), ["'again'"]),
    ],
)
def test_a_bad_choice_is_named(make: object, names: list[str]) -> None:
    with pytest.raises(fp.InvalidInput) as caught:
        make()  # type: ignore[operator]
    for name in names:
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", ["oneshot", "constant", "exponential", "polynomial"])
def test_a_schedule_by_name_ends_at_the_sparsity_asked_for(name: str) -> None:
    targets = choices.sparsities(choices.schedule_by_name(name, 0.87, None))
    assert targets[-1] == pytest.approx(0.87)
    assert len(targets) == (1 if name == "oneshot" else 12)


def test_the_default_schedule_prunes_a_fifth_of_what_is_left() -> None:
    assert choices.schedule_by_name("exponential", None, None) == fp.Exponential(0.2, 12)


@pytest.mark.parametrize(
    "choice",
    [
        fp.Magnitude(),
        fp.RandomSaliency(3),
        fp.Global(),
        fp.Layerwise(),
        fp.Continue(),
        fp.Rewind(7),
        fp.Reinitialize(),
        None,
        fp.Training(epochs=2, optimiser=fp.AdamW(lambda_=0.2)),
        fp.Training(optimiser=fp.Nesterov()),
    ],
)
def test_choices_survive_json(choice: object) -> None:
    assert choices.from_json(json.loads(json.dumps(choices.to_json(choice)))) == choice


@pytest.mark.parametrize(
    "value", [{"name": "Nothing"}, {"name": "Rewind", "from": 1}, 3, {}, {"name": ["Rewind"]}]
)
def test_json_of_no_choice_is_rejected(value: object) -> None:
    with pytest.raises(fp.InvalidInput, match="not a choice"):
        choices.from_json(value)


@pytest.mark.julia
@pytest.mark.parametrize(
    "schedule", [fp.OneShot(0.3), fp.Constant(0.07, 9), fp.Exponential(0.2, 12), fp.Polynomial(0.95, 7, 2.5)]
)
def test_schedules_equal_those_of_julia(schedule: fp.OneShot) -> None:
    from dataclasses import asdict

    from pyflux_prune.engines import julia

    main = julia.start()
    theirs = main.PrunableFlux.sparsities(getattr(main.PrunableFlux, type(schedule).__name__)(**asdict(schedule)))
    assert list(theirs) == pytest.approx(choices.sparsities(schedule), rel=1e-15)
