"""Selection in the reference engine, against torch.nn.utils.prune, torch.ao.pruning and plain loops."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch_networks import (
    arrays,
    assert_pruned_are_zero,
    assert_same,
    build,
    flat_masks,
    make_data,
    make_layers,
    plant_nan,
    pruned_model,
    with_weights,
)

from pyflux_prune.choices import (
    ERK,
    OBS,
    SNIP,
    STRUCTURES,
    Activation,
    Adam,
    Global,
    Layerwise,
    Magnitude,
    Neurons,
    NofM,
    PerOutput,
    RandomSaliency,
    Redundancy,
    Saliency,
    Sparsity,
    Structure,
    SynFlow,
    Taylor,
    Threshold,
    Wanda,
)
from pyflux_prune.engines.parts import Bool, Layer
from pyflux_prune.engines.torch import TorchModel, pruning, structure
from pyflux_prune.errors import InvalidInput, LayerCollapse

pytestmark = pytest.mark.filterwarnings("ignore::pyflux_prune.errors.LayerCollapse")

Unit = tuple[int, ...]
"""A weight (layer, output, input) or a neuron (layer, output)."""

sizes = st.lists(st.integers(1, 5), min_size=2, max_size=4)
two_sparsities = st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)).map(sorted)


@st.composite
def distinct_layers(draw: st.DrawFn) -> list[Layer]:
    """Layers of weights that all differ in magnitude, where no rule for ties is needed."""
    layers = make_layers(draw(sizes))
    n = sum(layer.weight.size for layer in layers)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return with_weights(layers, (rng.permutation(n) + 1) / n * rng.choice([-1, 1], n))


@st.composite
def tied_layers(draw: st.DrawFn) -> list[Layer]:
    layers = make_layers(draw(sizes))
    n = sum(layer.weight.size for layer in layers)
    return with_weights(layers, np.array(draw(st.lists(st.integers(-2, 2), min_size=n, max_size=n))))


@settings(deadline=None, max_examples=40)
@given(layers=distinct_layers(), steps=two_sparsities)
def test_layerwise_masks_are_those_of_l1_unstructured(layers: list[Layer], steps: list[float]) -> None:
    model = build(layers)
    peers = [nn.Linear(*layer.weight.shape[::-1]) for layer in layers]
    gone = [0] * len(layers)
    for peer, layer in zip(peers, layers, strict=True):
        peer.weight.data = torch.tensor(layer.weight)
    for step, sparsity in enumerate(steps):
        model.prune(Magnitude(), sparsity, Layerwise())
        for i, peer in enumerate(peers):
            target = round(sparsity * layers[i].weight.size)
            amount = target - gone[i] if step else sparsity
            torch_prune.l1_unstructured(peer, "weight", amount)  # type: ignore[no-untyped-call]
            gone[i] = target
            np.testing.assert_array_equal(model.layers()[i].mask, peer.get_buffer("weight_mask").bool())


@settings(deadline=None, max_examples=40)
@given(layers=distinct_layers(), steps=two_sparsities)
def test_global_masks_are_those_of_global_unstructured(layers: list[Layer], steps: list[float]) -> None:
    model = build(layers)
    peers = [nn.Linear(*layer.weight.shape[::-1]) for layer in layers]
    for peer, layer in zip(peers, layers, strict=True):
        peer.weight.data = torch.tensor(layer.weight)
    n = sum(layer.weight.size for layer in layers)
    for step, sparsity in enumerate(steps):
        model.prune(Magnitude(), sparsity, Global())
        amount = round(sparsity * n) - round(steps[0] * n) if step else sparsity
        torch_prune.global_unstructured(
            [(peer, "weight") for peer in peers], torch_prune.L1Unstructured, amount=amount
        )
        for layer, peer in zip(model.layers(), peers, strict=True):
            np.testing.assert_array_equal(layer.mask, peer.get_buffer("weight_mask").bool())


def expected_masks(model: TorchModel, structure: Structure, sparsity: float) -> list[Bool] | None:
    """The masks by the words of the design, from magnitudes; None where that cannot be done."""
    layers = model.layers()
    n = len(layers)
    competing = [la for la in range(n) if la not in structure.exclude and la - n not in structure.exclude]
    if not competing or (isinstance(structure, NofM) and sparsity > 1 - structure.n / structure.m):
        return None
    groups: dict[Any, list[Unit]] = {}
    for la in competing:
        for i, j in np.ndindex(layers[la].mask.shape):
            key: Any = 0
            if isinstance(structure, Layerwise):
                key = la
            elif isinstance(structure, PerOutput):
                key = la, i
            elif isinstance(structure, NofM):
                key = la, i, j // structure.m
                if layers[la].mask.shape[1] % structure.m:
                    return None
            groups.setdefault(key, []).append((la, i, j))
    score = {(la, *place): abs(float(w)) for la in range(n) for place, w in np.ndenumerate(layers[la].weight)}
    kept = {(la, *place) for la in range(n) for place, k in np.ndenumerate(layers[la].mask) if k}
    gone = lowest_of(list(groups.values()), score, kept, structure.min_kept, sparsity)
    if gone is None:
        return None
    masks = [layer.mask.copy() for layer in layers]
    for la, i, j in gone:
        masks[la][i, j] = False
    return masks


def lowest_of(
    groups: Sequence[Sequence[Unit]], score: dict[Unit, float], kept: set[Unit], min_kept: int, sparsity: float
) -> list[Unit] | None:
    """The units that go, ``min_kept`` of each layer being safe; None where a group cannot lose so many."""
    rank = sorted((u for group in groups for u in group if u in kept), key=lambda u: (score[u], u))
    layers = {u[0] for u in rank}
    safe = {u for la in layers for u in [v for v in rank if v[0] == la][::-1][:min_kept]}
    gone: list[Unit] = []
    for group in groups:
        count = round(sparsity * len(group)) - sum(u not in kept for u in group)
        free = [u for u in rank if u in set(group) - safe]
        if not 0 <= count <= len(free):
            return None
        gone += free[:count]
    return gone


def options(most_kept: int) -> dict[str, Any]:
    return {
        "exclude": st.sampled_from([(), (), (0,), (-1,), (0, -1)]),
        "min_kept": st.just(0) | st.integers(1, most_kept),
    }


weight_structures = st.one_of(
    *(st.builds(kind, **options(3)) for kind in (Global, Layerwise, PerOutput)),
    st.builds(NofM, n=st.just(1), m=st.just(2), **options(3)),
)


@settings(deadline=None, max_examples=250)
@given(layers=tied_layers(), steps=two_sparsities, structure=weight_structures)
def test_exactly_the_lowest_scores_go_and_ties_go_by_position(
    layers: list[Layer], steps: list[float], structure: Structure
) -> None:
    model = build(layers)
    for sparsity in steps:
        expected, before = expected_masks(model, structure, sparsity), arrays(model)
        if expected is None:
            with pytest.raises(InvalidInput):
                model.prune(Magnitude(), sparsity, structure)
            assert_same(before, arrays(model))
            continue
        model.prune(Magnitude(), sparsity, structure)
        assert_same([layer.mask for layer in model.layers()], expected)
        assert not any((new & ~old).any() for old, new in zip(before[1::3], arrays(model)[1::3], strict=True))
        assert_pruned_are_zero(model)
        before = arrays(model)
        model.prune(Magnitude(), sparsity, structure)
        assert_same(before, arrays(model))


any_criterion = st.sampled_from(
    [
        Magnitude(scaled=True),
        RandomSaliency(2),
        SynFlow(iterations=5),
        Wanda(),
        SNIP(2),
        Taylor(),
        OBS(iterations=2),
    ]
)


@settings(deadline=None, max_examples=120)
@given(
    criterion=any_criterion,
    structure=st.sampled_from(
        [Global(), Layerwise(exclude=(1,)), PerOutput(), ERK(min_kept=1), NofM(2, 6, exclude=(0,))]
    ),
    steps=two_sparsities,
    seed=st.integers(0, 100),
)
def test_with_any_criterion_counts_are_exact_and_masks_only_lose(
    criterion: Saliency, structure: Structure, steps: list[float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    model = build(make_layers((7, 6, 12, 3)))
    data = rng.normal(size=(30, 7)).astype(np.float32), np.arange(30) % 3
    competing = [la for place, la in enumerate(model.layers()) if place not in structure.exclude]
    for sparsity in steps:
        if isinstance(structure, NofM):
            sparsity *= 2 / 3
        before = [la.mask.copy() for la in model.layers()]
        model.prune(criterion, sparsity, structure, data)
        again = arrays(model)
        model.prune(criterion, sparsity, structure, data)
        assert_same(again, arrays(model))
        assert_pruned_are_zero(model)
        assert not any((la.mask & ~old).any() for la, old in zip(model.layers(), before, strict=True))
        assert all(model.layers()[place].mask.all() for place in structure.exclude)
        pruned = [~la.mask for la in competing]
        match structure:
            case Global():
                counts = [(sum(p.sum() for p in pruned), sum(p.size for p in pruned))]
            case Layerwise():
                counts = [(p.sum(), p.size) for p in pruned]
            case PerOutput():
                counts = [(row.sum(), row.size) for p in pruned for row in p]
            case NofM():
                counts = [(g.sum(), 6) for p in pruned for g in p.reshape(-1, 6)]
            case _:
                total, size = sum(p.sum() for p in pruned), sum(p.size for p in pruned)
                assert abs(total - sparsity * size) <= 0.5 + len(pruned) / 2
                continue
        assert all(count == round(sparsity * size) for count, size in counts)


def test_equal_weights_are_pruned_by_layer_then_output_then_input() -> None:
    layers = make_layers((3, 2, 2))
    model = build(with_weights(layers, np.ones(10)))
    for pruned in range(10):
        model.prune(Magnitude(), pruned / 10, Global())
        np.testing.assert_array_equal(flat_masks(model), np.arange(10) >= pruned)


@pytest.mark.parametrize(("sparsity", "pruned"), [(0.05, 0), (0.15, 2), (0.25, 2), (0.35, 4), (0.349, 3)])
def test_the_count_rounds_half_to_even(sparsity: float, pruned: int) -> None:
    model = build(make_layers((5, 2)))
    model.prune(Magnitude(), sparsity, Global())
    assert np.sum(~flat_masks(model)) == pruned


def test_layerwise_takes_one_sparsity_per_layer() -> None:
    model = build(make_layers())
    model.prune(Magnitude(), (0.5, 0.0, 0.8), Layerwise())
    assert [int((~layer.mask).sum()) for layer in model.layers()] == [21, 0, 12]


def test_kept_weights_keep_their_values() -> None:
    model = pruned_model(0.7)
    for layer, before in zip(model.layers(), make_layers(), strict=True):
        np.testing.assert_array_equal(layer.weight, np.where(layer.mask, before.weight, 0))
        np.testing.assert_array_equal(layer.bias, before.bias)


def test_random_pruning_with_one_seed_nests() -> None:
    step, leap = build(make_layers()), build(make_layers())
    step.prune(RandomSaliency(3), 0.3, Global())
    step.prune(RandomSaliency(3), 0.8, Global())
    leap.prune(RandomSaliency(3), 0.8, Global())
    assert_same(arrays(step), arrays(leap))


def test_nan_where_weights_are_pruned_is_no_obstacle() -> None:
    model = pruned_model(0.5)
    plant_nan(model)
    model.prune(Magnitude(), 0.8, Global())
    assert_same(arrays(model), arrays(pruned_model(0.8)))


def test_infinite_weights_go_last() -> None:
    model = build(make_layers())
    model.layers()[0].weight[0, 0] = -np.inf
    model.prune(Magnitude(), 0.98, Global())
    assert model.layers()[0].mask[0, 0]


def test_per_layer_sparsities_are_those_of_the_layers_that_compete() -> None:
    model = build(make_layers())
    model.prune(Magnitude(), (0.5, 0.8), Layerwise(exclude=(-2,)))
    assert [int((~layer.mask).sum()) for layer in model.layers()] == [21, 0, 12]
    model = build(make_layers())
    model.prune(Magnitude(), (0.6, 0.0), PerOutput(exclude=(0,)))
    assert [(~layer.mask).sum(1).tolist() for layer in model.layers()] == [[0] * 6, [4] * 5, [0] * 3]
    model = build(make_layers())
    model.prune(Magnitude(), (0.5, 0.2), Neurons(layerwise=True))
    assert [int((~layer.mask.any(1)).sum()) for layer in model.layers()] == [3, 1, 0]


def test_min_kept_prevents_collapse() -> None:
    layers = make_layers()
    layers[1].weight[:] *= 1e-3
    model, careless = build(layers), build(layers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.prune(Magnitude(), 0.8, Global(min_kept=2))
    assert model.layers()[1].mask.sum() == 2
    assert (~flat_masks(model)).sum() == round(0.8 * 87)
    with pytest.warns(LayerCollapse, match="no weight in layer 2"):
        careless.prune(Magnitude(), 0.8, Global())


# --- thresholds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", [Global(), Layerwise(), PerOutput(), ERK()], ids=str)
def test_without_a_sparsity_a_threshold_decides_whatever_the_structure(structure: Structure) -> None:
    model = pruned_model(0.2)
    structure = replace(structure, exclude=(1,), min_kept=20)
    before = [replace(la, weight=la.weight.copy(), mask=la.mask.copy()) for la in model.layers()]
    model.prune(Threshold(tau=1.5), None, structure)
    for place, (old, new) in enumerate(zip(before, model.layers(), strict=True)):
        stays = abs(old.weight) >= 1.5
        if place == 0:
            highest = np.sort(abs(old.weight[old.mask]))[-20:]
            assert highest[0] < 1.5  # some are saved
            stays |= abs(old.weight) >= highest[0]
        np.testing.assert_array_equal(new.mask, old.mask if place != 0 else old.mask & stays)


def test_with_a_sparsity_a_threshold_ranks() -> None:
    model, other = build(make_layers()), build(make_layers())
    model.prune(Threshold(tau=0.1), 0.5, Global())
    other.prune(Magnitude(), 0.5, Global())
    assert_same(arrays(model), arrays(other))


# --- Erdős–Rényi -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(
    widths=st.lists(st.integers(1, 30), min_size=2, max_size=5),
    sparsity=st.floats(0, 0.995),
    exclude=st.sampled_from([(), (0,)]),
)
def test_erdos_renyi_densities_are_as_the_sides_and_add_up(
    widths: list[int], sparsity: float, exclude: tuple[int, ...]
) -> None:
    assume(len(widths) > 2 or not exclude)
    model = build(make_layers(widths))
    model.prune(Magnitude(), sparsity, ERK(exclude=exclude))
    masks = [la.mask for place, la in enumerate(model.layers()) if place not in exclude]
    sides = np.array([sum(m.shape) for m in masks])
    size = np.array([m.size for m in masks])
    low, high = 0.0, 1e6  # ε by bisection
    for _ in range(200):
        middle = (low + high) / 2
        too_many = np.minimum(1, middle * sides / size) @ size > sum(size) - round(sparsity * sum(size))
        low, high = (low, middle) if too_many else (middle, high)
    kept = np.minimum(1, low * sides / size) * size
    assert (abs(np.array([m.sum() for m in masks]) - kept) <= 0.5 + 1e-6).all()
    assert all(model.layers()[place].mask.all() for place in exclude)


def test_erdos_renyi_leaves_small_layers_dense() -> None:
    model = build(make_layers((100, 50, 2)))
    model.prune(Magnitude(), 0.8, ERK())
    assert [int(la.mask.sum()) for la in model.layers()] == [920, 100]
    model.prune(Magnitude(), 0.99, ERK())
    assert [int(la.mask.sum()) for la in model.layers()] == [38, 13]


# --- N:M -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2)])
def test_n_of_m_masks_are_those_of_the_sparsifier_of_torch(n: int, m: int) -> None:
    from torch.ao.pruning import WeightNormSparsifier

    model = build(make_layers((16, 24, 8)))
    peer = nn.Sequential(*(nn.Linear(*layer.weight.shape[::-1]) for layer in model.layers()))
    for linear, layer in zip(peer, model.layers(), strict=True):
        linear.weight.data = torch.tensor(layer.weight)
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, m), zeros_per_block=m - n)
    sparsifier.prepare(peer, [{"tensor_fqn": f"{place}.weight"} for place in range(2)])
    sparsifier.step()
    model.prune(Magnitude(), None, NofM(n, m))
    for linear, layer in zip(peer, model.layers(), strict=True):
        np.testing.assert_array_equal(layer.mask, linear.parametrizations.weight[0].mask)
        assert (layer.mask.reshape(-1, m).sum(1) == n).all()


def test_two_of_four_is_what_semi_structured_kernels_take() -> None:
    """They keep two values of each four: the network comes back whole."""
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
        sparse_semi_structured_to_dense_cutlass,
    )

    model = build(make_layers((64, 32, 3)))
    for come_back in (False, True):
        weight = torch.tensor(model.layers()[0].weight).half()
        packed = sparse_semi_structured_from_dense_cutlass(weight)
        assert bool((sparse_semi_structured_to_dense_cutlass(*packed) == weight).all()) == come_back
        model.prune(Magnitude(), None, NofM())


@pytest.mark.parametrize("m", range(2, 13))
def test_n_of_m_takes_sparsities_up_to_its_own(m: int) -> None:
    for n in range(1, m):
        for sparsity in ((m - n) / m, 1 - n / m, None):
            model = build(make_layers((m * 2, 3)))
            model.prune(Magnitude(), sparsity, NofM(n, m))
            assert (model.layers()[0].mask.reshape(-1, m).sum(1) == n).all()
        with pytest.raises(InvalidInput, match=rf"at most .* for {n} of {m} weights to stay"):
            model.prune(Magnitude(), (m - n) / m + 1e-9, NofM(n, m))


def test_n_of_m_goes_on_from_lower_sparsities() -> None:
    model = build(make_layers((8, 4)))
    for sparsity, left in ((0.25, 3), (0.4, 2), (None, 1)):
        model.prune(Magnitude(), sparsity, NofM(1, 4))
        assert (model.layers()[0].mask.reshape(-1, 4).sum(1) == left).all()


# --- neurons ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [1, 2, 3])
@pytest.mark.parametrize("amount", [1, 3, 5])
def test_neurons_are_those_of_ln_structured(norm: int, amount: int) -> None:
    model = build(make_layers((7, 6, 3)))
    peer = nn.Linear(7, 6)
    peer.weight.data = torch.tensor(model.layers()[0].weight)
    torch_prune.ln_structured(peer, "weight", amount, n=norm, dim=0)  # type: ignore[no-untyped-call]
    model.prune(Magnitude(), amount / 6, Neurons(norm=norm))
    gone = ~peer.get_buffer("weight_mask").bool().any(1)
    np.testing.assert_array_equal(model.layers()[0].mask, peer.get_buffer("weight_mask"))
    np.testing.assert_array_equal(model.layers()[1].mask, ~gone.expand(3, -1))
    assert gone.sum() == amount


def test_negative_scores_count_against_a_neuron() -> None:
    model = build(make_layers())
    model.prune(Magnitude(), 0.3, Global())
    data = make_data()
    scores = model.scores(Taylor(), data)[0]
    signs = np.random.default_rng(0).choice([-1.0, 1.0], scores.shape)
    contest = pruning.Contest(Neurons(layerwise=True, norm=3), model.names, model.masks)
    given = [torch.tensor(scores * signs), *map(torch.tensor, model.scores(Taylor(), data)[1:])]
    before = structure.alive(model.masks)[0]
    after = structure.alive(contest.choose(given, model.masks, contest.kept((1 / 6, 0.0), model.masks)))[0]
    s = np.where(model.layers()[0].mask, scores * signs, 0)
    t = (np.sign(s) * np.abs(s) ** 3).sum(1)
    assert (before & ~after).nonzero().tolist() == [[int(np.argmin(np.cbrt(t)))]]


neurons = st.builds(Neurons, layerwise=st.booleans(), norm=st.sampled_from([1.0, 2.0]), **options(2))


@settings(deadline=None, max_examples=250)
@given(layers=tied_layers(), steps=two_sparsities, structure=neurons, start=st.floats(0, 0.6))
def test_exactly_the_lowest_neurons_go(
    layers: list[Layer], steps: list[float], structure: Neurons, start: float
) -> None:
    model = build(layers)
    model.prune(RandomSaliency(), start, Global())
    n = len(layers)
    competing = [la for la in range(n - 1) if la not in structure.exclude and la - n not in structure.exclude]
    for sparsity in steps:
        views, before = model.layers(), arrays(model)
        groups = [[(la, i) for i in range(len(views[la].mask))] for la in competing]
        kept = {
            (la, i)
            for la, i in itertools.chain(*groups)
            if views[la].mask[i].any() and views[la + 1].mask[:, i].any()
        }
        score = {
            (la, i): float((abs(views[la].weight[i]) ** structure.norm).sum())
            for la, i in itertools.chain(*groups)
        }
        if not structure.layerwise:
            groups = [list(itertools.chain(*groups))]
        gone = lowest_of(groups, score, kept, structure.min_kept, sparsity) if competing else None
        if gone is None:
            with pytest.raises(InvalidInput):
                model.prune(Magnitude(), sparsity, structure)
            assert_same(before, arrays(model))
            continue
        masks = [layer.mask.copy() for layer in views]
        for la, i in gone:
            masks[la][i] = False
            masks[la + 1][:, i] = False
        model.prune(Magnitude(), sparsity, structure)
        assert_same([layer.mask for layer in views], masks)
        assert_pruned_are_zero(model)


def test_neurons_with_scores_of_their_own_go_by_these() -> None:
    model, data = build(make_layers()), make_data()
    scores = model.scores(Activation(), data)
    model.prune(Activation(), (0.5, 0.4), Neurons(layerwise=True), data)
    for values, layer, count in zip(scores, model.layers(), (3, 2), strict=False):
        assert sorted(np.flatnonzero(~layer.mask.any(1))) == sorted(np.argsort(values)[:count])


def test_neurons_that_do_nothing_count_as_pruned() -> None:
    layers = make_layers()
    layers[0].mask[1] = False
    layers[1].mask[:, 4] = False
    model = build(layers)
    model.prune(Magnitude(), (0.5, 0.0), Neurons(layerwise=True))
    assert model.layers()[0].mask[4].all()  # its own weights are left alone
    gone = ~model.layers()[0].mask.any(1) | ~model.layers()[1].mask.any(0)
    assert gone.sum() == 3
    with pytest.raises(InvalidInput, match=r"0.2 of layer 0 means 1 of 6 neurons pruned, but 3 are already"):
        model.prune(Magnitude(), (0.2, 0.0), Neurons(layerwise=True))


def test_the_next_layer_loses_its_columns_even_if_its_neurons_are_excluded() -> None:
    model = build(make_layers())
    model.prune(Magnitude(), 0.5, Neurons(exclude=(1, -1)))
    assert [int((~la.mask.any(1)).sum()) for la in model.layers()] == [3, 0, 0]
    assert [int((~la.mask.any(0)).sum()) for la in model.layers()] == [0, 3, 0]


@pytest.mark.parametrize("criterion", [SynFlow(iterations=4), OBS(iterations=4), SNIP(2)], ids=str)
def test_criteria_of_weights_prune_neurons_too(criterion: Saliency) -> None:
    model, data = build(make_layers()), (make_data(60)[0], np.arange(60) % 3)
    model.prune(criterion, 0.5, Neurons(min_kept=1), data)
    alive = [here.mask.any(1) & after.mask.any(0) for here, after in itertools.pairwise(model.layers())]
    assert sum(int((~a).sum()) for a in alive) == round(0.5 * 11)


def test_neurons_that_die_with_others_do_no_harm() -> None:
    """When a neuron was all that another saw, the other counts as pruned in the steps that follow."""
    layers = make_layers((4, 6, 6, 3))
    layers[1].mask[:] = np.eye(6, dtype=bool)
    model = build(layers)
    model.prune(SynFlow(iterations=6), 0.5, Neurons())
    alive = [here.mask.any(1) & after.mask.any(0) for here, after in itertools.pairwise(model.layers())]
    assert sum(int(a.sum()) for a in alive) <= 6


# --- steps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("structure", "sparsity"), [
    (Global(), 0.9), (Layerwise(), (0.9, 0.3, 0.0)), (PerOutput(), 0.7), (Neurons(), 0.6),
], ids=str)  # fmt: skip
def test_each_step_keeps_its_share_of_each_group_and_scores_anew(structure: Structure, sparsity: Sparsity) -> None:
    model, twin, steps = pruned_model(0.05), pruned_model(0.05), 4
    contest = pruning.Contest(structure, model.names, model.masks)
    first, last = contest.counts(model.masks), contest.kept(sparsity, model.masks)
    model.prune(SynFlow(iterations=steps), sparsity, structure)
    for step in range(1, steps + 1):
        kept = [round(a * (b / a) ** (step / steps)) for a, b in zip(first.tolist(), last.tolist(), strict=True)]
        scores = [torch.tensor(s) for s in twin.scores(SynFlow())]
        twin.mask(contest.choose(scores, twin.masks, torch.tensor(kept)))
        if not isinstance(structure, Neurons):
            assert contest.counts(twin.masks).tolist() == kept
    assert_same(arrays(model), arrays(twin))
    once = pruned_model(0.05)
    once.prune(SynFlow(iterations=1), sparsity, structure)
    assert (flat_masks(once) != flat_masks(model)).any()


@pytest.mark.parametrize("interruption", [InvalidInput, KeyboardInterrupt])
def test_a_pruning_that_fails_half_way_changes_nothing(
    interruption: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = make_data()
    order, done = np.arange(len(y)), 0
    model, twin = pruned_model(0.1), pruned_model(0.1)
    compensate = pruning.compensate

    def fail(*arguments: Any) -> None:
        nonlocal done
        done += 1
        if done == 3:
            raise interruption
        compensate(*arguments)

    monkeypatch.setattr(pruning, "compensate", fail)
    for each in (model, twin):
        each.start(Adam())
        each.train(x, y, order, 4)
    before = arrays(model)
    with pytest.raises(interruption):
        model.prune(OBS(), 0.9, Global(), (x, y))
    assert_same(before, arrays(model))
    assert_same([model.train(x, y, order, 4), *arrays(model)], [twin.train(x, y, order, 4), *arrays(twin)])


def test_where_nothing_is_to_be_pruned_nothing_changes() -> None:
    """Not even survivors of OBS, whose Hessian would be singular here."""
    x, y = make_data()
    model = pruned_model(0.5)
    before = arrays(model)
    x[:] = 0
    model.prune(OBS(damping=0.0), 44 / 87, Global(), (x, y))
    assert_same(before, arrays(model))
    with pytest.raises(InvalidInput, match="singular"):
        model.prune(OBS(damping=0.0), 0.6, Global(), (x, y))


# --- what cannot be done ---------------------------------------------------------------------------------


def spoil_last_layer(model: TorchModel) -> None:
    last = model.layers()[-1]
    last.weight[np.unravel_index(np.argmax(last.mask), last.mask.shape)] = np.nan


def empty_one_output(model: TorchModel) -> None:
    model.layers()[1].mask[3] = False


def empty_some_neurons(model: TorchModel) -> None:
    model.layers()[1].mask[:, :4] = False


BAD: list[tuple[Sparsity | None, Structure, Any, str]] = [
    ((0.6, 0.6, 0.6), Global(), None, r"sparsity must be one number with Global.* not one per layer"),
    ((0.6, 0.6, 0.6), ERK(), None, "sparsity must be one number with ERK"),
    ((0.4, 0.4), NofM(1, 2, exclude=(0, 2)), None, "sparsity must be one number with NofM"),
    ((0.6, 0.6), Neurons(), None, "sparsity must be one number with Neurons"),
    ((0.6, 0.6), Layerwise(), None, "one number or one per competing layer, 3 here, not 2 numbers"),
    ((0.6, 0.6, 0.6), PerOutput(exclude=(0,)), None, "one per competing layer, 2 here, not 3 numbers"),
    ((0.6, 0.6, 0.6), Neurons(layerwise=True), None, "one per competing layer, 2 here, not 3 numbers"),
    (None, Global(), None, "sparsity must be given"),
    (None, Neurons(), None, "sparsity must be given"),
    (0.3, Global(), None, "0.3 of the network means 26 of 87 weights pruned, but 44 are already"),
    ((0.9, 0.9, 0.1), Layerwise(), None, "0.1 of layer 4 means 2 of 15 weights pruned, but"),
    (
        0.9,
        PerOutput(min_kept=30),
        None,
        "6 weights of output 0 of layer 0 must be pruned, but min_kept = 30 leaves 3",
    ),
    (
        0.5,
        PerOutput(),
        empty_one_output,
        "0.5 of output 3 of layer 2 means 3 of 6 weights pruned, but 6 are already",
    ),
    (
        0.34,
        NofM(1, 3, exclude=(0, 2)),
        empty_one_output,
        "0.34 of inputs 0 to 2 of output 3 of layer 2 me",
    ),
    (0.2, Neurons(), empty_some_neurons, "0.2 of the network means 2 of 11 neurons pruned, but 4 are already"),
    (
        0.9,
        Global(min_kept=9),
        None,
        r"weights of the network must be pruned, but min_kept = 9 leaves \d+ that can be",
    ),
    (
        (0.9, 0.0),
        Neurons(layerwise=True, min_kept=2),
        None,
        "5 neurons of layer 0 must be pruned, but min_kept = 2 ",
    ),
    (0.9, Global(exclude=(3,)), None, "exclude must hold numbers of the 3 prunable layers, .* not 3"),
    (0.9, Layerwise(exclude=(0, -4)), None, "exclude must hold numbers of the 3 prunable layers, .* not -4"),
    (0.9, ERK(exclude=(0, 1, -1)), None, r"exclude must leave layers that can be pruned, not \(0, 1, -1\)"),
    (0.9, Neurons(exclude=(0, 1)), None, r"exclude must leave layers that can be pruned, not \(0, 1\)"),
    (None, NofM(), None, "layer 0 has 7 inputs, not a multiple of m = 4.* exclude"),
    (0.6, NofM(1, 2, exclude=(0, 2)), None, "at most 0.5 for 1 of 2 weights to stay, not 0.6"),
    (0.9, Global(), spoil_last_layer, "layer 4 cannot be pruned: scores of its weights are NaN"),
    ((0.9, 0.9, 0.9), Layerwise(), spoil_last_layer, "layer 4 cannot be pruned"),
]


@pytest.mark.parametrize(("sparsity", "structure", "spoil", "message"), BAD)
def test_pruning_that_cannot_be_done_says_why_and_changes_nothing(
    sparsity: Sparsity | None, structure: Structure, spoil: Any, message: str
) -> None:
    dense = isinstance(structure, (PerOutput, NofM, Neurons))
    model = build(make_layers()) if dense else pruned_model(0.5)
    if spoil:
        spoil(model)
    before = arrays(model)
    with pytest.raises(InvalidInput, match=message):
        model.prune(Magnitude(), sparsity, structure)
    assert_same(before, arrays(model))


def test_a_threshold_does_not_cut_neurons() -> None:
    with pytest.raises(InvalidInput, match="sparsity must be given"):
        build(make_layers()).prune(Threshold(), None, Neurons())
    model = build(make_layers((4, 4)))
    model.prune(Threshold(), None, NofM())
    assert (model.layers()[0].mask.sum(1) == 2).all()


def test_neurons_need_a_hidden_layer() -> None:
    with pytest.raises(InvalidInput, match="Neurons needs a hidden layer"):
        build(make_layers((4, 4))).prune(Magnitude(), 0.5, Neurons())


@pytest.mark.parametrize("structure", [kind() for kind in STRUCTURES.values() if kind is not Neurons], ids=str)
@pytest.mark.parametrize("criterion", [Activation(), Redundancy()], ids=str)
def test_scores_of_neurons_need_the_structure_neurons(structure: Structure, criterion: Saliency) -> None:
    model = build(make_layers((4, 4, 4)))
    for sparsity in (0.0, 0.5):
        with pytest.raises(InvalidInput, match=f"structure must be Neurons with {type(criterion).__name__}"):
            model.prune(criterion, sparsity, structure, make_data())


def test_an_unknown_structure_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"structure must be .* not Structure\("):
        build(make_layers()).prune(Magnitude(), 0.5, Structure())


def test_nan_in_a_layer_that_does_not_compete_is_no_obstacle() -> None:
    model = build(make_layers())
    spoil_last_layer(model)
    model.prune(Magnitude(), 0.5, Global(exclude=(-1,)))
    model.prune(Magnitude(), 0.2, Neurons())


def test_nan_of_neurons_is_an_obstacle_where_they_are_alive() -> None:
    layers = make_layers()
    assert layers[1].bias is not None
    layers[1].bias[2] = np.nan
    model = build(layers)
    with pytest.raises(InvalidInput, match="layer 2 cannot be pruned: scores of its neurons are NaN"):
        model.prune(Activation(), 0.3, Neurons(), make_data())
    model.layers()[2].mask[:, 2] = False
    model.prune(Activation(), 0.3, Neurons(), make_data())


def test_a_failed_pruning_leaves_the_training_as_it_was() -> None:
    x, y = make_data()
    order = np.arange(len(y))
    model, twin = pruned_model(), pruned_model()
    for each in (model, twin):
        each.start(Adam())
        each.train(x, y, order, 4)
    with pytest.raises(InvalidInput, match="the network"):
        model.prune(Magnitude(), 0.1, Global())
    assert_same([model.train(x, y, order, 4), *arrays(model)], [twin.train(x, y, order, 4), *arrays(twin)])
