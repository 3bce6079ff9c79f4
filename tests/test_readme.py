"""Every command and snippet of README is run, or, where another test runs the same, named here."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_julia

TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.julia
@pytest.mark.slow
@pytest.mark.parametrize("snippet", blocks("python"), ids=lambda s: next(x for x in s.splitlines()[2:] if x)[:30])
def test_python_snippets_run(snippet: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    if "crosscheck" in snippet:
        assert done.stdout.startswith("True")


@pytest.mark.julia
@pytest.mark.slow
def test_julia_snippets_run(tmp_path: Path) -> None:
    for snippet in blocks("julia"):
        done = run_julia("-e", snippet + "\nround(sparsity(model); digits = 3) == 0.8 || exit(3)")
        assert done.returncode == 0, done.stderr


def test_the_commands_are_the_ones_that_are_tested() -> None:
    """.ci/run runs both in fresh environments; here, that they mean what they say."""
    install_and_run, install_and_test = (b.strip() for b in blocks("bash"))
    assert install_and_run == "python -m pip install -c tests/constraints.txt . && pyflux-prune run"
    install, test = install_and_test.split(" && ")
    assert install == 'python -m pip install -c tests/constraints.txt -e ".[test]"'
    assert test == "python -m pytest -n 2 --dist loadfile"
    assert (ROOT / "tests" / "constraints.txt").is_file()


def test_every_command_that_readme_names_exists() -> None:
    named = set(re.findall(r"`(pyflux-prune [\w-]+)", TEXT))
    assert len(named) >= 6
    for command in named:
        done = subprocess.run(
            [sys.executable, "-m", "pyflux_prune", *shlex.split(command)[1:], "--help"],
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ,
        )
        assert done.returncode == 0, done.stderr
