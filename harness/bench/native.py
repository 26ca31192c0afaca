"""Compiles the C counterparts, statically: one executable serves this machine and any host."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from harness.errors import HostError
from harness.host.cache import build_file, cache_dir

_SOURCES = Path(__file__).parent
_FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-s")
_TIMEOUT_S = 120.0


class NativeBuildError(HostError):
    """A C counterpart could not be compiled; one line says why."""


def executable(name: str) -> Path:
    """Return `name`.c of this package as a static executable, compiled unless the cache has it.

    Raises NativeBuildError: no compiler, no static C library, or the source was refused.
    """
    source = _SOURCES / f"{name}.c"
    compiler = _find_compiler()
    digest = hashlib.sha256(repr((_version(compiler), _FLAGS)).encode() + source.read_bytes())
    path = cache_dir() / "bench" / f"{name}-{digest.hexdigest()[:16]}"
    return build_file(path, lambda target: _compile(compiler, source, target))


def _find_compiler() -> str:
    wanted = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    for name in wanted:
        if found := shutil.which(name):
            return found
    raise NativeBuildError(
        f"no C compiler ({', '.join(wanted)}): comparing with C needs one (Debian: gcc, libc6-dev)"
    )


def _version(compiler: str) -> str:
    return _run([compiler, "--version"], compiler)


def _compile(compiler: str, source: Path, target: Path) -> None:
    _run([compiler, *_FLAGS, "-o", str(target), str(source)], source.name)


def _run(command: list[str], what: str) -> str:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise NativeBuildError(f"{what}: {e}") from e
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        marked = [line for line in lines if "error" in line or "cannot find" in line]
        cause = next(iter([*marked, *lines]), "the compiler failed without a message")
        raise NativeBuildError(f"{what}: {cause}")
    return done.stdout
