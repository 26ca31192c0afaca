"""Compiles the C counterparts, statically: one executable serves this machine and any host."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from harness.host.cache import build_file, cache_dir
from harness.host.compiler import Compiler

_SOURCES = Path(__file__).parent
_FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-s", "-pthread")
_OWN_HEADER = re.compile(r'^#include "(\w+)\.h"', re.MULTILINE)


def executable(name: str) -> Path:
    """Return `name`.c of this package as a static executable, compiled unless the cache has it.

    With it goes the source of every header of the package that it includes.

    Raises CompilerError: no compiler, no static C library, or the source was refused.
    """
    main = _SOURCES / f"{name}.c"
    parts = _OWN_HEADER.findall(main.read_text())
    sources = [main.name, *(f"{part}.c" for part in parts)]
    compiler = Compiler()
    digest = hashlib.sha256(repr((compiler.version, _FLAGS)).encode())
    for file in (*sources, *(f"{part}.h" for part in parts)):
        digest.update((_SOURCES / file).read_bytes())
    path = cache_dir() / "bench" / f"{name}-{digest.hexdigest()[:16]}"

    def compile_to(target: Path) -> None:
        compiler.run([*_FLAGS, "-o", str(target), *sources], _SOURCES, main.name)

    return build_file(path, compile_to)
