from __future__ import annotations

import json
from dataclasses import replace
from statistics import mean

import numpy as np
import pytest

import pyflux_prune as fp
from pyflux_prune import experiment, lottery
from pyflux_prune.datasets import Dataset

QUICK = fp.Training(epochs=3, batchsize=32, optimiser=fp.Adam(0.01))
SCHEDULE = [0.5, 0.8]


def arrays(net: fp.Network) -> list[np.ndarray]:
    return [a.copy() for la in net.layers for a in (la.weight, la.mask, la.bias)]


@pytest.mark.parametrize("to", [0, 5])
def test_a_ticket_and_its_controls(engine: str, blobs: Dataset, to: int) -> None:
    found = fp.lottery_ticket(
        [6, 12, 3], blobs, schedule=SCHEDULE, finetune=fp.Rewind(to), training=QUICK, seeds=(1, 4), engine=engine
    )
    assert [r.round for r in found.rounds] == [1, 2]
    assert [r.density for r in found.rounds] == pytest.approx([0.5, 0.2], abs=0.01)
    for i, seed in enumerate((1, 4)):
        net = fp.mlp([6, 12, 3], seed=seed, engine=engine)
        initial = net.copy()
        run = fp.iterative_prune(
            net,
            blobs,
            structure=fp.Layerwise(),
            schedule=SCHEDULE,
            finetune=fp.Rewind(to),
            training=QUICK,
            seed=seed,
        )
        assert run.baseline is not None
        assert found.dense[i] == run.baseline.accuracy
        assert [r.ticket[i] for r in found.rounds] == [r.accuracy for r in run.rounds]
        # The same mask on new weights, over the same batches.
        plan = replace(run.plan, finetune=fp.Reinitialize())
        origin = experiment.copies(initial.layers)
        for la, mask in zip(initial.layers, net.masks, strict=True):
            la.mask[:] = mask
        experiment.restart(initial.model, plan, origin, 2)
        assert (initial.weights[0][initial.masks[0]] != origin[0].weight[initial.masks[0]]).all()
        experiment.train_round(initial.model, blobs, plan, 2)
        assert found.rounds[1].reinitialised[i] == (initial.predict(blobs.x_test) == blobs.y_test).mean()


def test_random_masks_are_of_the_same_densities(blobs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    real = lottery.train_round

    def spy(model, data, plan, number, tick):  # type: ignore[no-untyped-def]
        kept.append((number, experiment.copies(model.layers())))
        return real(model, data, plan, number, tick)

    monkeypatch.setattr(lottery, "train_round", spy)
    net = fp.prune(fp.mlp([6, 12, 3], engine="torch"), fp.RandomSaliency(), sparsity=0.1)
    before = arrays(net)
    fp.lottery_ticket(net, blobs, schedule=SCHEDULE, training=QUICK, seeds=[3])
    assert [number for number, _ in kept] == [1, 1, 2, 2]
    for (_, ticket), (_, random) in (kept[:2], kept[2:]):
        assert any((a.mask != b.mask).any() for a, b in zip(ticket, random, strict=True))
        for a, b, initial in zip(ticket, random, net.layers, strict=True):
            assert a.mask.sum() == b.mask.sum()
            assert not (b.mask & ~initial.mask).any()
            assert (b.weight[b.mask] == initial.weight[b.mask]).all()
    assert all(np.array_equal(a, b) for a, b in zip(before, arrays(net), strict=True))


def result(dense: list[float], *rounds: tuple[float, list[float]], tolerance: float = 0.005) -> fp.LotteryTicket:
    plan = experiment.Plan(fp.Magnitude(), fp.Layerwise(), (0.5, 0.8), fp.Rewind(), QUICK, 0)
    made = tuple(
        lottery.TicketRound(
            i, density, tuple(ticket), tuple(a - 0.03 for a in ticket), tuple(a + 0.01 for a in ticket)
        )
        for i, (density, ticket) in enumerate(rounds, start=1)
    )
    return fp.LotteryTicket("blobs", "torch", plan, tuple(range(len(dense))), tolerance, tuple(dense), made, {})


def test_the_answer_names_the_sparsest_winning_ticket_and_how_far_the_controls_are() -> None:
    found = result([0.96, 0.98], (0.5, [0.97, 0.98]), (0.2, [0.96, 0.97]), (0.1, [0.9, 0.9]))
    assert found.winning is found.rounds[1]
    assert found.answer == (
        "With 20.0% of the weights the ticket reaches 96.50% test accuracy, no more than 0.5 percentage points "
        "below the dense network's 97.00%; from new initial weights it ends 3.00 points lower, and random masks "
        "on its own initial weights 1.00 points higher (means of 2 seeds)."
    )
    none = result([0.96], (0.5, [0.9]), (0.2, [0.91]))
    assert none.winning is None
    assert none.answer == (
        "Every ticket is more than 0.5 percentage points below the dense network's 96.00% test accuracy: the "
        "best, with 20.0% of the weights, reaches 91.00% (one seed)."
    )
    assert result([0.96], (0.5, [0.9]), tolerance=0.1).winning is not None


def test_the_result_as_table_markdown_and_json() -> None:
    found = result([0.96, 0.98], (0.5, [0.97, 0.98]))
    assert found.markdown().splitlines() == [
        "| weights kept | ticket | new initial weights | random masks |",
        "| --: | --: | --: | --: |",
        "| 100.0% | 97.00% (96.00%–98.00%) |  |  |",
        "| 50.0% | 97.50% (97.00%–98.00%) | 94.50% (94.00%–95.00%) | 98.50% (98.00%–99.00%) |",
    ]
    assert found.table().row_count == 2
    value = json.loads(json.dumps(found.to_json()))
    assert value["answer"] == found.answer
    assert value["rounds"][0]["ticket"] == [0.97, 0.98]
    assert value["plan"]["structure"]["name"] == "Layerwise"
    assert mean(value["dense"]) == pytest.approx(0.97)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"seeds": ()}, ["seeds", "()"]),
        ({"seeds": (1, 1)}, ["seeds", "different"]),
        ({"seeds": 3}, ["seeds", "3"]),
        ({"seeds": [[1]]}, ["each of seeds", "[1]"]),
        ({"seeds": (0, -1)}, ["seeds", "-1"]),
        ({"finetune": fp.Continue()}, ["finetune must be Rewind", "Continue"]),
        ({"finetune": fp.Rewind(99)}, ["21 training steps", "99"]),
        ({"tolerance": 2}, ["tolerance", "2"]),
        ({"net": [6]}, ["sizes"]),
        ({"net": [5, 3]}, ["6 features", "5 features"]),
        ({"data": None}, ["data"]),
        ({"structure": fp.NofM()}, ["layer 0"]),
        ({"engine": "jax"}, ["engine", "'jax'"]),
    ],
)
def test_bad_arguments_are_named(blobs: Dataset, arguments: dict[str, object], names: list[str]) -> None:
    given = {"net": [6, 12, 3], "data": blobs, "schedule": SCHEDULE, "training": QUICK, "engine": "torch"}
    with pytest.raises(fp.InvalidInput) as caught:
        fp.lottery_ticket(**(given | arguments))  # type: ignore[arg-type]
    for name in names:
        assert name in str(caught.value)


def test_progress_goes_to_stderr(blobs: Dataset, capfd: pytest.CaptureFixture[str]) -> None:
    fp.lottery_ticket([6, 3], blobs, schedule=[0.5], training=QUICK, seeds=(0,), engine="torch", progress=True)
    assert capfd.readouterr().out == ""
