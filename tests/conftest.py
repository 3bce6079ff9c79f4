from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest

import pyflux_prune as fp
from pyflux_prune.engines import get_engine, julia

# An example that compiles, or the first that imports torch, takes as long as it takes.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

ROOT = Path(__file__).parents[1]
MNIST = ROOT.parent / "shared" / "data" / "mnist10k"


@functools.cache
def why_no_julia() -> str | None:
    try:
        get_engine("julia")
    except fp.EngineUnavailable as error:
        return str(error)
    return None


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        import torch

        # More threads than cores would wait for each other. Not by an environment variable: the processes that
        # tests start would inherit it, and some of them test the number of threads.
        torch.set_num_threads(1)
    elif getattr(config.option, "numprocesses", None):
        # At its first start Julia compiles its packages, which workers must not do at the same time. It starts
        # in a process of its own, as this one has no use for it.
        subprocess.run([sys.executable, "-m", "pyflux_prune", "doctor"], stdout=subprocess.DEVNULL)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("julia") and (reason := why_no_julia()):
        if os.environ.get("PYFLUX_PRUNE_REQUIRE_JULIA") == "1":
            pytest.fail(f"PYFLUX_PRUNE_REQUIRE_JULIA=1, but {reason}", pytrace=False)
        pytest.skip(f"needs Julia: {reason}")


@pytest.fixture(params=[pytest.param("julia", marks=pytest.mark.julia), "torch"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def blobs() -> fp.datasets.Dataset:
    """Three classes that a small network separates."""
    rng = np.random.default_rng(0)
    y = np.arange(300) % 3
    x = rng.normal(size=(300, 6)).astype(np.float32)
    x[np.arange(300), y] += 3
    return fp.datasets.arrays(x, y, test_size=0.3, seed=0, name="blobs")


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    if not MNIST.is_dir():
        pytest.skip(f"needs real MNIST in {MNIST}")
    return MNIST


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a fresh interpreter of this environment."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=600,
    )


def run_julia(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Julia with the project that this environment's juliacall uses."""
    main = julia.start()
    command = [
        str(main.seval("Base.julia_cmd()[1]")),
        f"--project={main.Base.active_project()}",
        "--startup-file=no",
    ]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=600)
