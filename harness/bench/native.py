"""Compiles the C counterparts, statically: one executable serves this machine and any host."""

from __future__ import annotations

import hashlib
from pathlib import Path

from harness.host.cache import build_file, cache_dir
from harness.host.compiler import Compiler

_SOURCES = Path(__file__).parent
_FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-s")


def executable(name: str) -> Path:
    """Return `name`.c of this package as a static executable, compiled unless the cache has it.

    Raises CompilerError: no compiler, no static C library, or the source was refused.
    """
    source = _SOURCES / f"{name}.c"
    compiler = Compiler()
    digest = hashlib.sha256(repr((compiler.version, _FLAGS)).encode() + source.read_bytes())
    path = cache_dir() / "bench" / f"{name}-{digest.hexdigest()[:16]}"

    def compile_to(target: Path) -> None:
        compiler.run([*_FLAGS, "-o", str(target), source.name], source.parent, source.name)

    return build_file(path, compile_to)
