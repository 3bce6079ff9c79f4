"""What the Julia engine needs, whether it is here, and what mends it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from dataclasses import asdict, dataclass
from typing import Any

from . import sysimage
from .engines import get_engine
from .errors import EngineUnavailable


@dataclass(frozen=True)
class Finding:
    """One thing looked for.

    Attributes:
        what: the thing.
        ok: whether it can be used.
        found: what was found.
        mend: the command that mends it, or nothing.
        needed: whether the Julia engine cannot do without it.

    """

    what: str
    ok: bool
    found: str
    mend: str = ""
    needed: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def examine() -> list[Finding]:
    """Look for everything both engines need; this starts Julia, or tries to."""
    findings = [_executable()]
    try:
        versions = get_engine("julia").versions()
    except EngineUnavailable as error:
        findings.append(
            Finding("Julia engine", False, str(error.__cause__ or error).splitlines()[0], _mend(), needed=True)
        )
    else:
        packages = ", ".join(f"{name} {versions[name]}" for name in ("Flux", "PrunableFlux", "juliacall"))
        findings += [
            Finding("Julia engine", True, f"Julia {versions['julia']}, {packages}", needed=True),
            Finding("threads", True, f"{versions['threads']} of {os.cpu_count()} processors"),
            Finding("BLAS", True, f"{versions['blas']}, {versions['blas_threads']} threads"),
            _image(),
            _gpu(),
        ]
    return [*findings, _torch()]


def _executable() -> Finding:
    path = os.environ.get("PYTHON_JULIACALL_EXE") or os.environ.get("PYTHON_JULIAPKG_EXE") or shutil.which("julia")
    if path:
        return Finding("julia", True, path)
    return Finding("julia", False, "not on the PATH; juliapkg downloads one where there is internet access")


def _mend() -> str:
    if os.environ.get("PYTHON_JULIAPKG_OFFLINE") == "yes":
        return "unset PYTHON_JULIAPKG_OFFLINE on a machine with internet access, and run pyflux-prune doctor again"
    return "curl -fsSL https://install.julialang.org | sh    # then run pyflux-prune doctor again"


def _image() -> Finding:
    from .engines.julia import place, said

    if given := said("SYSIMAGE"):
        return Finding("system image", True, f"{given}, as PYTHON_JULIACALL_SYSIMAGE says")
    project = place()
    if fitting := sysimage.find(*project):
        return Finding("system image", True, str(fitting))
    stale = ", ".join(map(str, sysimage.built(project[1])))
    found = f"{stale} is stale, and not used: Julia, a package or the processor is another" if stale else "none"
    return Finding("system image", False, found, "pyflux-prune build-sysimage    # to start sooner")


def _gpu() -> Finding:
    from .engines.julia import start

    main = start()
    if bool(main.seval('isnothing(Base.identify_package("CUDA"))')):
        return Finding("GPU", False, "CUDA.jl is not in Julia's project; networks run on the processor")
    return Finding(
        "GPU", True, "CUDA.jl is in Julia's project; in Julia, gpu(model) moves a network and its masks"
    )


def _torch() -> Finding:
    try:
        return Finding("PyTorch", True, importlib.metadata.version("torch"))
    except importlib.metadata.PackageNotFoundError:
        return Finding("PyTorch", False, "not installed; it is the reference engine", "pip install 'torch<2.14'")
