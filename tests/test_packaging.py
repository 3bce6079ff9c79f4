from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

import pyflux_prune


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_carries_the_julia_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("src", "ext"):
        for source in (ROOT / "julia" / folder).rglob("*.jl"):
            assert f"pyflux_prune/julia/{source.relative_to(ROOT / 'julia')}" in names
    assert {"pyflux_prune/juliapkg.json", "pyflux_prune/julia/Project.toml", "pyflux_prune/py.typed"} <= names
    assert not any("Manifest" in n or "/test/" in n for n in names)
    assert sum(n.endswith("PrunableFlux.jl") for n in names) == 1


def test_juliapkg_json_points_at_the_julia_package() -> None:
    folder = Path(pyflux_prune.__file__).parent
    package = json.loads((folder / "juliapkg.json").read_text())["packages"]["PrunableFlux"]
    project = (folder / package["path"] / "Project.toml").read_text()
    assert package["uuid"] in project
    assert f'version = "{pyflux_prune.__version__}"' in project


@pytest.mark.julia
@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """Its own copy of the Julia package is found and used; its Python dependencies are borrowed from here."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    here = Path(pyflux_prune.__file__).parents[1]
    borrowed = [p for p in sys.path if "site-packages" in p and Path(p) != here]
    (site / "borrowed.pth").write_text("\n".join(borrowed))
    code = (
        "import pyflux_prune as fp; from pyflux_prune.engines import julia; import json;"
        "net = fp.prune(fp.mlp([4, 8, 3], engine='julia'), sparsity=0.5);"
        "print(json.dumps([fp.__file__, str(julia.start().pathof(julia.start().PrunableFlux)), net.sparsity]))"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON_JULIA") and k != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
        env=environment | {"PYTHON_JULIAPKG_PROJECT": str(tmp_path / "project")},
    )
    assert done.returncode == 0, done.stderr
    file, source, sparsity = json.loads(done.stdout)
    assert file.startswith(str(site))
    assert source.startswith(str(site))
    assert sparsity == 0.5
