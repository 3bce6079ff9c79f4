"""What holds for the bridge to Julia: lazy start, coexistence with torch, zero copies, Ctrl-C."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from conftest import run_julia, run_python

import pyflux_prune as fp
from pyflux_prune.engines import julia
from pyflux_prune.engines.parts import alike, arrays, with_arrays


def test_importing_starts_nothing() -> None:
    done = run_python(
        "import sys, pyflux_prune as fp; fp.datasets.digits();"
        "print([m for m in ('juliacall', 'juliapkg', 'torch', 'matplotlib') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr
    timed = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import pyflux_prune"], capture_output=True, text=True
    )
    assert "juliacall" not in timed.stderr


TRAIN = """
import pyflux_prune as fp
data = fp.datasets.digits()
net = fp.mlp([64, 20, 10], engine="julia")
run = fp.iterative_prune(net, data, schedule=[0.5], training=fp.Training(epochs=3, optimiser=fp.Adam(0.01)))
assert run.rounds[0].accuracy > 0.5
"""


@pytest.mark.julia
@pytest.mark.parametrize("first", ["import torch", "import juliacall", ""])
def test_torch_and_julia_live_together_in_either_order(first: str) -> None:
    use_torch = "import torch\nlinear = torch.nn.Linear(500, 500)\nlinear(torch.rand(500, 500)).sum().backward()\n"
    done = run_python(f"{first}\n{TRAIN}\n{use_torch}\n{TRAIN}\nprint('whole')")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "whole\n"
    assert done.stderr == ""


@pytest.mark.julia
@pytest.mark.parametrize("first", ["import juliacall", ""])
def test_threads_may_need_julia_at_the_same_time(first: str) -> None:
    done = run_python(
        f"""
{first}
import threading
import pyflux_prune as fp
shapes = []
def use():
    shapes.append(fp.mlp([4, 3, 2], engine="julia")([1, 2, 3, 4]).shape)
threads = [threading.Thread(target=use) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(shapes)
"""
    )
    assert (done.returncode, done.stdout) == (0, f"{4 * [(2,)]}\n"), done.stderr


THREADS = """
import os
from pyflux_prune.engines import julia
main = julia.start()
print(main.Threads.nthreads(), main.LinearAlgebra.BLAS.get_num_threads())
print(sorted(k for k in os.environ if k.startswith("PYTHON_JULIACALL_") and k not in given))
"""


@pytest.mark.julia
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (len(os.sched_getaffinity(0)), 1)),
        ({"PYTHON_JULIACALL_THREADS": "1"}, (1, 1)),
        ({"JULIA_NUM_THREADS": "3"}, (3, 1)),
        ({"JULIA_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}, (2, 2)),
        ({"PYTHON_JULIACALL_HANDLE_SIGNALS": "no"}, (1, 1)),
    ],
)
def test_threads_are_the_machine_s_or_what_the_user_said(
    given: dict[str, str], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTHON_JULIACALL_THREADS", "JULIA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    kept = [k for k in os.environ if k.startswith("PYTHON_JULIACALL_")]
    done = run_python(f"given = {[*given, *kept]}\n{THREADS}", **given)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{expected[0]} {expected[1]}\n[]\n"


@pytest.mark.julia
def test_threaded_julia_survives_garbage_collection() -> None:
    loop = "Threads.@threads for i in 1:200; sum(sum, [rand(999) for _ in 1:50]); i % 50 > 0 || GC.gc(); end"
    done = run_python(
        f"from pyflux_prune.engines import julia; julia.start().seval({loop!r}); print('whole')",
        JULIA_NUM_THREADS="4",
    )
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr


@pytest.mark.parametrize("given", [None, "16000"])
def test_threads_stay_awake_unless_the_user_said_for_how_long(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "JULIA_THREAD_SLEEP_THRESHOLD"
    monkeypatch.delenv(name, raising=False) if given is None else monkeypatch.setenv(name, given)
    assert julia._defaults().get(name) == (str(julia.NANOSECONDS_AWAKE) if given is None else None)


@pytest.mark.julia
def test_julia_may_run_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JULIA_PYTHONCALL_EXE", sys.executable)
    monkeypatch.setenv("JULIA_CONDAPKG_BACKEND", "Null")
    code = 'using PythonCall; println(pyimport("pyflux_prune").mlp([3, 2]; engine="julia"))'
    done = run_julia("-e", code)
    assert (done.returncode, "3–2" in done.stdout) == (0, True), done.stderr


@pytest.mark.julia
def test_packages_that_do_not_load_are_one_sentence() -> None:
    done = run_python(
        """
from pyflux_prune.engines import julia
julia.LOAD = 'error("no such luck")'
try:
    julia.start()
except Exception as error:
    print(type(error).__name__, error)
"""
    )
    assert done.stdout == (
        "EngineUnavailable Julia could not be started (no such luck); `pyflux-prune doctor` says what is missing\n"
    )
    assert done.stderr == ""


@pytest.mark.julia
def test_weights_and_masks_are_views_of_julia_s_memory() -> None:
    net = fp.mlp([5, 7, 2], engine="julia")
    main = julia.start()
    model = net.model._model  # type: ignore[attr-defined]
    for layer, flux in zip(net.layers, model.layers, strict=True):
        for view, array in (
            (layer.weight, flux.dense.weight),
            (layer.mask, flux.mask),
            (layer.bias, flux.dense.bias),
        ):
            assert view.ctypes.data == int(main.UInt(main.pointer(array)))
            assert not view.flags.owndata
    net.layers[0].weight[3, 4] = 42
    assert model.layers[0].dense.weight[3, 4] == 42
    net.layers[0].mask[3, 4] = False
    assert not model.layers[0].mask[3, 4]


@pytest.mark.julia
def test_arrays_that_julia_has_copied_are_not_kept() -> None:
    parts = fp.vgg((2,), (4,), input_shape=(1, 4, 4), engine="torch").copy().parts
    given = [{name: array.copy() for name, array in arrays(part).items()} for part in parts]
    held = [weakref.ref(array) for each in given for array in each.values()]
    model = julia.JuliaEngine().build([with_arrays(*each) for each in zip(parts, given, strict=True)])
    del given
    gc.collect()
    assert [ref() for ref in held] == [None] * len(held)
    assert alike(model.parts(), parts)
    fp.Network(model).layers[0].mask[0] = False
    small = model.compact()
    assert small.parts()[1].weight.shape == (1, 1, 3, 3)


@pytest.mark.julia
def test_inputs_labels_and_order_cross_without_a_copy() -> None:
    bridge, main = julia._bridge(), julia.start()
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    borrowed = bridge.borrow(main.Float32, julia._at(x), 4, 3)
    assert int(main.UInt(main.pointer(borrowed))) == x.ctypes.data
    assert main.typeof(borrowed) == main.seval("Matrix{Float32}")
    x[2, 1] = 99  # sample 3, feature 2
    assert borrowed[1, 2] == 99


@pytest.mark.julia
def test_an_epoch_makes_no_python_call_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 batches in one epoch: a handful of calls into Julia, and not one from Julia back into Python."""
    net = fp.mlp([8, 16, 3], engine="julia")
    rng = np.random.default_rng(0)
    x, y = rng.random((20_000, 8), dtype=np.float32), rng.integers(0, 3, 20_000)
    net.model.start(fp.Adam())
    net.model.train(x, y, np.arange(100), 10)
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        losses = net.model.train(x, y, np.arange(20_000), 10)
    finally:
        sys.setprofile(None)
    assert len(losses) == 2000
    assert calls < 1000


INTERRUPTED = """
import os, signal, threading, time
import numpy as np
import pyflux_prune as fp
rng = np.random.default_rng(0)
data = fp.datasets.arrays(rng.random((20000, 300), dtype=np.float32), np.arange(20000) % 10)
net = fp.mlp([300, 500, 500, 10], engine="julia")
fp.prune(net, sparsity=0.5)
fp.iterative_prune(net, data, schedule=[0.5], finetune=None, training=fp.Training(epochs=0))
print("training", flush=True)
began = None
try:
    fp.iterative_prune(net, data, schedule=[0.6], training=fp.Training(epochs=1000))
except KeyboardInterrupt:
    print("interrupted", flush=True)
assert all(np.isfinite(la.weight).all() and (la.weight[~la.mask] == 0).all() for la in net.layers)
assert net.sparsity == 0.5
run = fp.iterative_prune(net, data, schedule=[0.7], finetune=None, training=fp.Training(epochs=0))
print("whole", flush=True)
"""


def heed_ctrl_c() -> None:
    """In a process to be: what a shell starts in the background ignores SIGINT, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.julia
def test_ctrl_c_interrupts_training_at_once_and_leaves_the_network_whole() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "training\n"
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        # 1,000 epochs would take hours: only an interruption inside an epoch lets these lines come in time.
        assert process.stdout.readline() == "interrupted\n"
        assert process.stdout.readline() == "whole\n"
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()


@pytest.mark.julia
def test_ctrl_c_on_the_command_line_leaves_the_last_whole_round(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pyflux_prune", "run", "--epochs", "100", "--engine", "julia", "--out", "run"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,
    )
    record = tmp_path / "run" / "run.json"
    deadline = time.monotonic() + 300
    while not record.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "pyflux-prune: interrupted"
    assert out == ""
    assert json.loads(record.read_text())["baseline"]["round"] == 0
    fp.Network.load(tmp_path / "run" / "model.safetensors", engine="julia")


@pytest.mark.julia
@pytest.mark.slow
def test_it_starts_from_an_installed_julia_and_project(tmp_path: Path) -> None:
    main = julia.start()
    done = run_python(
        TRAIN,
        PYTHON_JULIACALL_EXE=str(main.seval('joinpath(Sys.BINDIR, "julia")')),
        PYTHON_JULIACALL_PROJECT=str(Path(str(main.Base.active_project())).parent),
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.julia
@pytest.mark.slow
def test_it_starts_offline_from_packages_in_the_depot(tmp_path: Path) -> None:
    done = run_python(TRAIN, PYTHON_JULIAPKG_OFFLINE="yes", PYTHON_JULIAPKG_PROJECT=str(tmp_path / "project"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "project" / "Manifest.toml").exists()


@pytest.mark.julia
def test_julia_s_own_errors_come_as_this_package_s() -> None:
    net = fp.prune(fp.mlp([5, 7, 2], engine="julia"), sparsity=0.5)
    with pytest.raises(fp.InvalidInput, match="pruned stays pruned") as caught:
        net.model.prune(fp.Magnitude(), 0.1, fp.Global())
    assert "Stacktrace" not in str(caught.value)
