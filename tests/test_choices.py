from __future__ import annotations

import json
from dataclasses import fields, replace

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
    assert choices.sparsities(fp.Cosine(0.8, 4)) == pytest.approx(
        [0.8 * t for t in (0.14644661, 0.5, 0.85355339, 1)]
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
        fp.Cosine(rate, rounds),
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
            ["Magnitude, Threshold", "EdgePopup or Random"],
        ),
        (lambda: fp.RandomSaliency(seed=-1), ["seed", "-1"]),
        (lambda: fp.RandomSaliency(seed=2**63), ["seed", "below 9223372036854775808", "not 9223372036854775808"]),
        (lambda: fp.Global(min_kept=2**63), ["min_kept", "below 9223372036854775808"]),
        (lambda: fp.NofM(2, 2**70), ["NofM's m", "below 9223372036854775808"]),
        (lambda: fp.Taylor(batchsize=2**70), ["batchsize", "below 9223372036854775808"]),
        (lambda: fp.SNIP(per_class=2**70), ["per_class", "below 9223372036854775808"]),
        (lambda: fp.Training(batchsize=2**70), ["batchsize", "below 9223372036854775808"]),
        (lambda: fp.SynFlow(iterations=10**6), ["iterations", "below 1000000"]),
        (lambda: fp.Exponential(0.1, 10**9), ["rounds", "below 1000000", "1000000000"]),
        (lambda: fp.OneShot(10**400), ["sparsity", "not 1000", "...", "000"]),
        (lambda: fp.OneShot(-(10**5000)), ["sparsity", "a whole number of 16610 bits"]),
        (lambda: fp.OneShot(np.complex64(0.5)), ["sparsity", "0.5"]),
        (lambda: fp.Adam(eta=10**400), ["eta", "not 1000"]),
        (lambda: choices.sparsities(np.zeros((9, 9, 9))), ["sparsity", "0.0"]),
        (lambda: fp.Magnitude(scaled=np.zeros((9, 9))), ["scaled", "array"]),
        (lambda: fp.Training(optimiser=(np.zeros((99, 99)), np.zeros((99, 99)))), ["optimiser", "array"]),
        (lambda: fp.Magnitude(scaled=1), ["Magnitude's scaled", "True or False", "1"]),
        (lambda: fp.Threshold(tau=0), ["tau", "0"]),
        (lambda: fp.EdgePopup(sparsity=1), ["EdgePopup's sparsity", "1"]),
        (lambda: fp.Movement(training=3), ["Movement's training", "Training", "3"]),
        (lambda: fp.NofM(4, 4), ["NofM's n", "below m = 4"]),
        (lambda: fp.Global(exclude="0"), ["exclude", "'0'"]),
        (lambda: fp.Global(exclude=(0, 1.5)), ["exclude", "1.5"]),
        (lambda: fp.Layerwise(min_kept=-1), ["min_kept", "-1"]),
        (lambda: fp.Neurons(norm=0.5), ["norm", "0.5"]),
        (lambda: fp.RigL(fraction=0), ["fraction", "0"]),
        (lambda: fp.Training(decay=0), ["decay", "0"]),
        (lambda: choices.check_match(fp.Activation(), fp.Global()), ["Neurons", "Activation", "Global"]),
        (lambda: choices.sparsities([0.5, 0.4]), ["never go down", "0.4", "0.5"]),
        (lambda: choices.sparsities([(0.5, 0.5), (0.6, 0.4)]), ["never go down"]),
        (lambda: choices.sparsities([]), ["at least one"]),
        (lambda: choices.sparsities("steep"), ["schedule", "'steep'"]),
        (lambda: choices.sparsities([0.5, 1.5]), ["1.5"]),
        (lambda: choices.sparsities(fp.Exponential(0.97, 20)), ["sparsity", "1.0"]),
        (lambda: choices.schedule_by_name("steep", None, None), ["oneshot", "'steep'"]),
        (lambda: choices.schedule_by_name("oneshot", 0.5, 3), ["rounds", "3"]),
        (lambda: choices.finetune_by_name("rewind:x"), ["rewind:STEP", "'rewind:x'"]),
        (lambda: choices.finetune_by_name("rewind:" + 5000 * "9"), ["rewind:STEP", "'rewind:9"]),
        (lambda: choices.finetune_by_name("rewind:" + 19 * "9"), ["Rewind's to", "below 9223372036854775808"]),
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


@pytest.mark.parametrize("name", list(choices.SCHEDULES))
def test_a_schedule_by_name_ends_at_the_sparsity_asked_for(name: str) -> None:
    targets = choices.sparsities(choices.schedule_by_name(name, 0.87, None))
    assert targets[-1] == pytest.approx(0.87)
    assert len(targets) == (1 if name == "oneshot" else 12)


def test_a_class_of_the_user_s_own_changes_nothing_for_others() -> None:
    class Nets(fp.Network):
        pass

    class Sets(fp.datasets.Dataset):
        pass

    class Longer(fp.Training):
        pass

    class Slower(fp.Adam):
        pass

    class Smaller(fp.Magnitude):
        pass

    class Other(choices.Saliency):
        pass

    data = Sets("x", np.eye(2), np.arange(2), np.eye(2), np.arange(2), 2)
    net = Nets(fp.mlp([2, 2], engine="torch").model)
    plain = fp.mlp([2, 2], engine="torch")
    for some in (net, plain):
        fp.iterative_prune(some, data, schedule=[0.5], training=fp.Training(epochs=1, optimiser=fp.Adam()))
        for saliency in (Smaller(), Other()):
            with pytest.raises(fp.InvalidInput, match=r"saliency must be Magnitude, .* or RandomSaliency, not"):
                fp.prune(some, saliency, sparsity=0.5)
        with pytest.raises(fp.InvalidInput, match="training must be Training, not"):
            fp.iterative_prune(some, data, training=Longer())
    with pytest.raises(fp.InvalidInput, match=r"optimiser must be Descent, .*AdamW, not"):
        fp.Training(optimiser=Slower())
    assert Other not in choices.choices_on(choices.Saliency)


def test_layers_to_exclude_may_be_a_number_or_an_array() -> None:
    assert fp.Global(exclude=-1).exclude == (-1,)  # type: ignore[arg-type]
    assert fp.Global(exclude=np.array([0, 2])) == fp.Global(exclude=(0, 2))  # type: ignore[arg-type]
    assert fp.Global(exclude=np.array(1)) == fp.Global(exclude=(1,))  # type: ignore[arg-type]


def test_the_learning_rate_decays_by_epoch() -> None:
    training = fp.Training(optimiser=fp.Descent(0.1), decay=0.5)
    assert [training.eta(epoch) for epoch in range(3)] == pytest.approx([0.1, 0.05, 0.025])


def test_the_default_schedule_prunes_a_fifth_of_what_is_left() -> None:
    assert choices.schedule_by_name("exponential", None, None) == fp.Exponential(0.2, 12)


shares = st.floats(0, 0.99)
FIELDS = {
    "activations": st.booleans(),
    "batchsize": st.integers(1, 500),
    "beta": st.tuples(shares, shares),
    "damping": st.floats(0, 10),
    "decay": st.floats(0.1, 1.2),
    "epochs": st.integers(0, 50),
    "epsilon": st.floats(1e-12, 1),
    "eta": st.floats(1e-6, 10),
    "exact": st.booleans(),
    "exclude": st.lists(st.integers(-3, 3), max_size=3).map(tuple),
    "fraction": st.floats(0.01, 0.99),
    "full": st.booleans(),
    "iterations": st.integers(1, 200),
    "lambda_": st.floats(0, 1),
    "layerwise": st.booleans(),
    "m": st.integers(4, 16),
    "min_kept": st.integers(0, 5),
    "n": st.integers(1, 3),
    "norm": st.floats(1, 8),
    "optimiser": st.deferred(lambda: made(choices.Optimiser)),
    "per_class": st.integers(1, 50),
    "power": st.floats(0.1, 5),
    "q": st.floats(0.1, 5),
    "rate": st.floats(0, 0.01) | st.lists(st.floats(0, 0.01), min_size=1, max_size=4).map(tuple),
    "rho": shares,
    "rounds": st.integers(1, 20),
    "scaled": st.booleans(),
    "seed": st.integers(0, 2**63 - 1),
    "squared": st.booleans(),
    "tau": st.none() | st.floats(1e-3, 5),
    "temperature": st.floats(0.1, 500),
    "to": st.integers(0, 500),
    "training": st.deferred(lambda: fields_of(fp.Training)),
    "zeros": st.booleans(),
}


def fields_of(choice: type) -> st.SearchStrategy[object]:
    """Draw a choice of this class, all its fields drawn."""
    targets = shares | st.lists(shares, min_size=1, max_size=4).map(tuple)
    own = {"sparsity": targets if issubclass(choice, choices.Schedule) else shares}
    return st.builds(choice, **{f.name: (own | FIELDS)[f.name] for f in fields(choice)})


def made(*axes: type) -> st.SearchStrategy[object]:
    """Draw any choice on these axes."""
    return st.one_of([fields_of(c) for axis in axes for c in choices.choices_on(axis)])


AXES = (
    choices.Saliency,
    choices.Structure,
    choices.Schedule,
    choices.Restart,
    choices.Regrowth,
    choices.Optimiser,
)


@given(choice=st.none() | made(*AXES) | fields_of(fp.Training))
def test_choices_survive_json(choice: object) -> None:
    assert choices.from_json(json.loads(json.dumps(choices.to_json(choice)))) == choice


def texts(choice: object) -> list[str]:
    """Return the fields of a choice as on the command line; those of a training inside belong to it."""
    written = []
    for f in fields(choice):  # type: ignore[arg-type]
        value = getattr(choice, f.name)
        if isinstance(value, fp.Training):
            written += texts(value)
        elif isinstance(value, tuple):
            written += [f"{f.name}={'/'.join(map(str, value))}"] if value else []
        elif isinstance(value, (bool, int, float)):
            written.append(f"{f.name}={value}")
    return written


@given(choice=made(choices.Saliency, choices.Structure, choices.Regrowth))
def test_choices_are_found_by_name(choice: object) -> None:
    classes = choices.SALIENCIES | choices.STRUCTURES | choices.REGROWTHS
    name = next(name for name, c in classes.items() if type(choice) is c)
    if isinstance(choice, (fp.Movement, fp.EdgePopup)):  # text does not say the optimiser
        training = replace(choice.training, optimiser=type(choice)().training.optimiser)
        choice = replace(choice, training=training)
    assert choices.by_name("axis", classes, ":".join([name, ",".join(texts(choice))])) == choice


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("size", ["--saliency must be one of magnitude, threshold", "'size'"]),
        ("taylor:square=true", ["--saliency taylor takes squared=…, batchsize=…", "'square=true'"]),
        ("taylor:squared", ["squared=…", "'squared'"]),
        ("wanda:q=1", ["no options", "'q=1'"]),
        ("movement:training=3", ["epochs=…", "'training=3'"]),
        ("movement:epochs=-3", ["epochs", "-3"]),
        ("obs:damping=much", ["OBS's damping", "'much'"]),
    ],
)
def test_bad_text_is_named(text: str, names: list[str]) -> None:
    with pytest.raises(fp.InvalidInput) as caught:
        choices.by_name("--saliency", choices.SALIENCIES, text)
    for name in names:
        assert name in str(caught.value)


def test_every_choice_is_exported() -> None:
    for axis in AXES:
        for choice in choices.choices_on(axis):
            assert getattr(fp, choice.__name__) is choice
            assert choice.__name__ in fp.__all__


@pytest.mark.parametrize(
    "value", [{"name": "Nothing"}, {"name": "Rewind", "from": 1}, 3, {}, {"name": ["Rewind"]}]
)
def test_json_of_no_choice_is_rejected(value: object) -> None:
    with pytest.raises(fp.InvalidInput, match="not a choice"):
        choices.from_json(value)


@pytest.mark.julia
@pytest.mark.parametrize(
    "schedule",
    [
        fp.OneShot(0.3),
        fp.Constant(0.07, 9),
        fp.Exponential(0.2, 12),
        fp.Polynomial(0.95, 7, 2.5),
        fp.Cosine(0.9, 7),
    ],
)
def test_schedules_equal_those_of_julia(schedule: fp.OneShot) -> None:
    from dataclasses import asdict

    from pyflux_prune.engines import julia

    main = julia.start()
    theirs = main.PrunableFlux.sparsities(getattr(main.PrunableFlux, type(schedule).__name__)(**asdict(schedule)))
    assert list(theirs) == pytest.approx(choices.sparsities(schedule), rel=1e-15)
