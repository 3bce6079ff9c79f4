from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.table import Table

import pyflux_prune as fp
from pyflux_prune import choices, cli

Command = Callable[..., tuple[int, str, str]]
QUICK = ["--epochs", "1", "--rounds", "2", "--hidden", "8"]


def run_cli(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["pyflux-prune", *arguments])
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    out, err = capfd.readouterr()
    return int(exit_.value.code or 0), out, err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run_cli(monkeypatch, capfd, *map(str, arguments))


def test_run_prints_a_table_and_writes_the_next_free_directory(command: Command, engine: str) -> None:
    for folder in ("run", "run-2"):
        code, out, err = command("run", "--engine", engine, *QUICK)
        assert (code, err) == (0, "")
        assert "dense" in out
        assert "36.0%" in out
        assert {p.name for p in Path(folder).iterdir()} >= {
            "run.json",
            "rounds.csv",
            "model.safetensors",
            "curve.png",
        }


def test_run_json_is_one_object_of_the_documented_form(command: Command, engine: str) -> None:
    code, out, err = command("run", "--engine", engine, "--json", "--out", "there", *QUICK)
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result.keys() == {"engine", "data", "seed", "baseline", "rounds", "model"}
    assert result["engine"] == engine
    assert result["baseline"].keys() >= {"accuracy", "loss", "parameters"}
    assert len(result["rounds"]) == 2
    for r in result["rounds"]:
        assert r.keys() == {"round", "sparsity", "accuracy", "loss", "nonzero", "seconds", "layers"}
        assert all(la.keys() == {"name", "density"} for la in r["layers"])
    assert Path(result["model"]) == Path("there/model.safetensors")


def test_run_takes_every_axis_from_the_command_line(command: Command) -> None:
    code, out, _ = command(
        "run",
        "--engine",
        "torch",
        "--json",
        "--saliency",
        "random",
        "--structure",
        "layerwise",
        "--schedule",
        "constant",
        "--sparsity",
        "0.5,0.8",
        "--rounds",
        "2",
        "--finetune",
        "rewind:3",
        "--epochs",
        "1",
        "--hidden",
        "8",
        "--seed",
        "4",
    )
    assert code == 0
    last = json.loads(out)["rounds"][-1]
    assert [la["density"] for la in last["layers"]] == [0.5, 0.2]
    plan = json.loads(Path("run/run.json").read_text())["plan"]
    assert plan["finetune"] == {"name": "Rewind", "to": 3}
    assert plan["seed"] == 4


def test_choices_take_their_fields_from_the_command_line(command: Command, engine: str) -> None:
    arguments = ("--saliency", "snip:per_class=3", "--structure", "layerwise:exclude=-1", "--schedule", "cosine")
    more = ("--sparsity", "0.8", "--finetune", "continue", "--decay", "0.9", "--no-pretrain")
    code, out, err = command("run", "--engine", engine, *QUICK, *arguments, *more)
    assert (code, err) == (0, "")
    assert "untrained" in out
    record = json.loads(Path("run/run.json").read_text())
    plan = record["plan"]
    assert plan["saliency"] == {"name": "SNIP", "per_class": 3}
    assert plan["structure"] == {"name": "Layerwise", "exclude": [-1], "min_kept": 0}
    assert plan["schedule"] == pytest.approx([0.4, 0.8])
    assert plan["training"]["decay"] == 0.9
    assert plan["pretrain"] is False
    assert [la["density"] for la in record["rounds"][-1]["layers"]] == pytest.approx([0.2, 1.0], abs=0.01)


def test_a_lost_layer_is_one_line_on_stderr(command: Command) -> None:
    arguments = ("--structure", "layerwise", "--sparsity", "0.5,0.999", "--rounds", "2", "--saliency", "random")
    code, out, err = command("run", "--engine", "torch", "--json", "--hidden", "8", "--epochs", "1", *arguments)
    assert code == 0
    assert json.loads(out)["rounds"][-1]["layers"][1]["density"] == 0
    assert err.count("\n") == 1
    assert err.startswith("pyflux-prune: pruning left no weight in layer 2")


def test_tables_in_files_are_not_cut(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    table = Table("a heading", "another " * 12)
    table.add_row("1", "2")
    cli._print(False, {}, lambda: table)
    assert "another " * 11 in capfd.readouterr().out


def test_run_resumes(command: Command) -> None:
    assert command("run", "--engine", "torch", "--out", "a", *QUICK)[0] == 0
    code, out, err = command("run", "--resume", "a", "--json")
    assert (code, err) == (0, "")
    assert len(json.loads(out)["rounds"]) == 2


@pytest.mark.julia
def test_crosscheck_shows_the_differences_and_exits_by_them(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("crosscheck", "--epochs", "1", "--rounds", "1", "--hidden", "8", "--json")
    code, out, err = command(*arguments)
    assert (code, err) == (0, "")
    assert json.loads(out)["ok"]
    monkeypatch.setattr(sys.modules["pyflux_prune.crosscheck"], "FORWARD", 0.0)
    code, out, _ = command(*arguments)
    assert code == 1
    assert {d["quantity"] for d in json.loads(out)["differences"] if not d["ok"]} == {"forward", "compact network"}


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["run", "--data", "nonsense"], ["digits, mnist:DIR", "'nonsense'"]),
        (["run", "--data", "mnist:missing"], ["missing"]),
        (["run", "--data", "absent.npz"], ["absent.npz"]),
        (["run", "--hidden", "3,x"], ["--hidden", "'3,x'"]),
        (["run", "--hidden", "0"], ["--hidden", "'0'"]),
        (["run", "--sparsity", "1.2"], ["--sparsity", "1.2"]),
        (["run", "--sparsity", "high"], ["--sparsity", "'high'"]),
        (["run", "--sparsity", "0.5,0.5"], ["sparsity must be one number with Global", "not one per layer"]),
        (
            ["run", "--structure", "global:min_kept=99999999999999999999"],
            ["min_kept", "below 9223372036854775808"],
        ),
        (["run", "--out", ""], ["--out must be the name of a file or folder, not ''"]),
        (["run", "--out", 300 * "a"], ["out must be", "too long"]),
        (["run", "--resume", ""], ["--resume must be the name of a file or folder, not ''"]),
        (["run", "--resume", 300 * "a"], ["no run to resume"]),
        (["bench", "--batch", ""], ["batches"]),
        (["inspect", ""], ["MODEL must be the name of a file"]),
        (["convert", "", "b.safetensors"], ["IN must be the name of a file"]),
        (
            ["convert", "a.safetensors", "b.pt", "--activation", "tanh"],
            ["--activation is for an IN that ends in .pt"],
        ),
        (["run", "--saliency", "size"], ["--saliency", "magnitude, threshold", "'size'"]),
        (["run", "--saliency", "taylor:square=true"], ["--saliency taylor", "squared=…", "'square=true'"]),
        (["run", "--saliency", "activation"], ["Neurons", "Activation"]),
        (["run", "--saliency", "snip:per_class=1000"], ["1000"]),
        (["run", "--structure", "nofm:n=5"], ["n must be below m = 4"]),
        (["run", "--structure", "nofm"], ["at most 0.5"]),
        (["run", "--schedule", "steep"], ["steep"]),
        (["run", "--decay", "0"], ["decay", "0"]),
        (["run", "--no-pretrain", "--finetune", "rewind:3"], ["pretrain"]),
        (["run", "--schedule", "oneshot", "--rounds", "3"], ["rounds", "3"]),
        (["run", "--finetune", "again"], ["'again'"]),
        (["run", "--epochs", "-1"], ["-1"]),
        (["run", "--engine", "jax"], ["jax"]),
        (["run", "--out", "full"], ["full", "not empty"]),
        (["run", "--resume", "full"], ["no run to resume"]),
        (["run", "--bogus"], ["--bogus"]),
        (["run", "--network", "resnet"], ["resnet", "mlp", "lenet5", "vgg"]),
        (["run", "--network", "lenet5"], ["lenet5", "layer 3 has windows of (5, 5)", "(6, 4, 4)"]),
        (["run", "--network", "lenet5", "--hidden", "9"], ["--hidden is for --network mlp, vgg and vgg16"]),
        (["inspect", "absent.safetensors"], ["absent.safetensors"]),
        (["inspect", "full/precious"], ["precious"]),
        (["convert", "a.onnx", "b.safetensors"], ["IN", ".safetensors or .pt", "a.onnx"]),
        (["convert", "full/precious.pt", "b.safetensors"], ["precious.pt"]),
        (["frobnicate"], ["frobnicate"]),
    ],
)
def test_bad_usage_is_one_line_on_stderr_and_exit_code_2(
    command: Command, arguments: list[str], names: list[str]
) -> None:
    Path("full").mkdir()
    Path("full/precious").write_text("data")
    Path("full/precious.pt").write_text("data")
    code, out, err = command(
        *arguments, *(["--engine", "torch"] if arguments[0] == "run" and "--engine" not in arguments else [])
    )
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("pyflux-prune: ")
    for name in names:
        assert name in err
    assert sorted(p.name for p in Path().iterdir()) == ["full"]


@pytest.fixture
def model(tmp_path: Path) -> fp.Network:
    net = fp.prune(fp.mlp([64, 30, 10], engine="torch"), sparsity=0.95, structure=fp.Global(min_kept=1))
    net.save(tmp_path / "model.safetensors")
    return net


def test_inspect_counts_what_the_mask_leaves(command: Command, model: fp.Network) -> None:
    code, out, _ = command("inspect", "model.safetensors", "--json")
    assert code == 0
    shown = json.loads(out)
    assert shown["bytes"] == Path("model.safetensors").stat().st_size
    for shown_layer, layer in zip(shown["layers"], model.layers, strict=True):
        assert shown_layer["shape"] == list(layer.weight.shape)
        assert shown_layer["nonzero"] == layer.mask.sum()
        assert shown_layer["flops"] == 2 * layer.mask.sum()
        assert shown_layer["bytes"] == 4 * layer.weight.size + -(-layer.mask.size // 8) + 4 * layer.bias.size
    assert "5.00%" in command("inspect", "model.safetensors")[1]


def test_convert_goes_to_sparse_and_pytorch_and_back(command: Command, model: fp.Network) -> None:
    import torch

    assert command("convert", "model.safetensors", "sparse.safetensors", "--sparse")[0] == 0
    sizes = [Path(p).stat().st_size for p in ("model.safetensors", "sparse.safetensors")]
    assert sizes[1] < sizes[0] / 4
    listed = json.loads(command("inspect", "sparse.safetensors", "--json")[1])["layers"]
    assert listed[0]["bytes"] == 4 * model.masks[0].sum() + 30 * 64 // 8 + 4 * 30
    assert command("convert", "sparse.safetensors", "model.pt")[0] == 0
    state = torch.load("model.pt", weights_only=True)
    assert set(state) >= {"0.weight_orig", "0.weight_mask", "0.bias"}
    code, _, err = command("convert", "model.pt", "back.safetensors")
    assert code == 2
    assert "activation" in err
    code, out, err = command("convert", "model.pt", "back.safetensors", "--activation", "relu", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"file": "back.safetensors", "bytes": Path("back.safetensors").stat().st_size}
    for layer, back in zip(model.layers, fp.Network.load("back.safetensors", engine="torch").layers, strict=True):
        assert (layer.weight == back.weight).all()
        assert (layer.mask == back.mask).all()
    assert command("convert", "model.safetensors", "bad.pt", "--sparse")[0] == 2


@pytest.fixture
def vgg(tmp_path: Path) -> fp.Network:
    net = fp.vgg((4, "M", 6, "M"), (10,), input_shape=(1, 8, 8), engine="torch")
    fp.prune(net, sparsity=0.5, structure=fp.Neurons(layerwise=True)).save(tmp_path / "vgg.safetensors")
    return net


def test_inspect_counts_the_places_of_a_convolution(command: Command, vgg: fp.Network) -> None:
    code, out, _ = command("inspect", "vgg.safetensors", "--json")
    assert code == 0
    listed = json.loads(out)["layers"]
    assert [layer["shape"] for layer in listed] == [list(w.shape) for w in vgg.weights]
    kept = [int(mask.sum()) for mask in vgg.masks]
    assert [layer["flops"] for layer in listed] == [2 * kept[0] * 64, 2 * kept[1] * 16, 2 * kept[2], 2 * kept[3]]
    out = command("inspect", "vgg.safetensors")[1]
    assert "4 × 1 × 3 × 3" in out
    assert "10 × 24" in out


def test_convert_takes_networks_of_images(command: Command, vgg: fp.Network, engine: str) -> None:
    import torch

    assert command("convert", "vgg.safetensors", "sparse.safetensors", "--sparse")[0] == 0
    compact = command("convert", "sparse.safetensors", "small.safetensors", "--compact", "--engine", engine)
    assert compact[0] == 0
    small = fp.Network.load("small.safetensors", engine="torch")
    assert [w.shape for w in small.weights] == [(2, 1, 3, 3), (3, 2, 3, 3), (5, 12), (10, 5)]
    x = np.random.default_rng(0).random((5, 1, 8, 8), np.float32)
    np.testing.assert_allclose(small(x), vgg(x), rtol=1e-4, atol=1e-5)
    assert command("convert", "small.safetensors", "small.pt")[0] == 0
    module = fp.to_torch(small)
    module.load_state_dict(torch.load("small.pt", weights_only=True))
    code, _, err = command("convert", "small.pt", "back.safetensors", "--activation", "relu")
    assert code == 2
    assert "layer 0 is a convolution, and a state dict does not tell its stride" in err


def test_convert_can_leave_out_dead_neurons(command: Command, engine: str) -> None:
    net = fp.prune(fp.mlp([64, 30, 10], engine="torch"), sparsity=0.5, structure=fp.Neurons())
    net.save("model.safetensors")
    code, _, err = command("convert", "model.safetensors", "small.safetensors", "--compact", "--engine", engine)
    assert (code, err.count("\n")) == (0, 1)
    small = fp.Network.load("small.safetensors", engine="torch")
    assert [w.shape for w in small.weights] == [(15, 64), (10, 15)]
    x = np.random.default_rng(0).random((5, 64), np.float32)
    np.testing.assert_allclose(small(x), net(x), rtol=1e-5, atol=1e-6)
    assert Path("small.safetensors").stat().st_size < Path("model.safetensors").stat().st_size / 1.9


def test_a_pt_file_that_would_run_code_is_refused(command: Command, tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "owned",))

    Path("evil.pt").write_bytes(pickle.dumps(Evil()))
    code, _, err = command("convert", "evil.pt", "out.safetensors", "--activation", "relu")
    assert code == 2
    assert "evil.pt" in err
    assert not Path("owned").exists()
    assert not Path("out.safetensors").exists()


@pytest.mark.julia
def test_doctor_finds_julia(command: Command) -> None:
    code, out, _ = command("doctor")
    assert code == 0
    assert "Julia engine" in out
    findings = json.loads(command("doctor", "--json")[1])
    assert {"Julia engine", "threads", "BLAS", "system image", "GPU", "PyTorch"} <= {f["what"] for f in findings}


NO_JULIA = {"PATH": "/nowhere", "PYTHON_JULIAPKG_OFFLINE": "yes"}
"""What hides Julia from a fresh interpreter; the project of its environment is hidden too."""


def without_julia(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON_JULIA")} | NO_JULIA
    return subprocess.run(
        [sys.executable, "-m", "pyflux_prune", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        env=environment | {"PYTHON_JULIAPKG_PROJECT": str(tmp_path / "empty")},
    )


def test_without_julia_auto_warns_once_and_uses_pytorch(tmp_path: Path) -> None:
    done = without_julia(tmp_path, "run", "--json", *QUICK)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["engine"] == "torch"
    assert done.stderr.count("Julia could not be started") == 1
    assert "doctor" in done.stderr


def test_without_julia_asking_for_it_is_an_error(tmp_path: Path) -> None:
    done = without_julia(tmp_path, "run", "--engine", "julia", *QUICK)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Julia could not be started" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_without_julia_doctor_says_how_to_mend_it(tmp_path: Path) -> None:
    done = without_julia(tmp_path, "doctor")
    assert done.returncode == 1
    assert "missing Julia engine" in done.stdout


def test_help_lists_the_choices(command: Command) -> None:
    for name in ("run", "crosscheck"):
        words = set(re.split(r"[\s,.|\[\]]+", command(name, "--help")[1]))
        known = {*choices.SALIENCIES, *choices.STRUCTURES, *choices.SCHEDULES, *choices.FINETUNES.split("|")}
        assert known <= words


def test_help_is_there_for_every_command(command: Command) -> None:
    for name in ("run", "crosscheck", "inspect", "convert", "bench", "build-sysimage", "doctor"):
        code, out, _ = command(name, "--help")
        assert code == 0
        assert "Usage" in out


@pytest.mark.parametrize("hidden", [[], ["--hidden", "8,9"]])
def test_run_prunes_networks_of_images(command: Command, engine: str, hidden: list[str]) -> None:
    few = ["--epochs", "1", "--rounds", "1", "--engine", engine, "--out", "there", "--json"]
    code, out, _ = command("run", "--network", "vgg", *hidden, *few)
    assert code == 0
    assert json.loads(out)["rounds"][0]["sparsity"] == pytest.approx(0.2, abs=1e-3)
    net = fp.Network.load("there/model.safetensors", engine="torch")
    dense = [w.shape[0] for w in net.weights[2:]]
    assert dense == ([8, 9, 10] if hidden else [10])
    assert net.input_shape == (1, 8, 8)
    assert json.loads(command("run", "--resume", "there", "--json")[1])["engine"] == engine


def test_lenet5_takes_the_images_of_an_npz_file(command: Command) -> None:
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    np.savez("images.npz", x=rng.normal(size=(60, 1, 12, 12)), y=y)
    few = ["--epochs", "1", "--rounds", "1", "--engine", "torch", "--out", "there"]
    assert command("run", "--data", "images.npz", "--network", "lenet5", *few)[0] == 0
    net = fp.Network.load("there/model.safetensors", engine="torch")
    assert (net.input_shape, net.outputs) == ((1, 12, 12), 3)
    np.savez("flat.npz", x=rng.normal(size=(60, 144)), y=y)
    for network in ("lenet5", "vgg", "vgg16"):
        code, _, err = command("run", "--data", "flat.npz", "--network", network, "--engine", "torch")
        assert code == 2
        assert f"--network {network} needs images, x of the shape (samples, channels, height, width)" in err
        assert "but flat has samples of 144 features" in err


@pytest.mark.julia
def test_crosscheck_takes_networks_of_images(command: Command) -> None:
    assert command("crosscheck", "--network", "vgg", "--epochs", "1", "--rounds", "1")[0] == 0


def test_npz_data(command: Command) -> None:
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    np.savez("data.npz", x=rng.normal(size=(90, 4)) + y[:, None], y=y)
    code, out, _ = command("run", "--data", "data.npz", "--engine", "torch", "--json", *QUICK)
    assert code == 0
    assert json.loads(out)["data"] == "data"
