"""What is called inside a host to run a program that was sent there."""

from __future__ import annotations

import base64
import subprocess
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

Emit = Callable[..., None]


def run_program(emit: Emit, *, name: str, data: str, limit_s: float) -> dict[str, Any]:
    """Run a program without arguments; return its `status` and its output's last `lines`.

    Args:
        emit: not used.
        name: the file's name, which programs print and open.
        data: the file, compressed by zlib, in base64.
        limit_s: after which it is killed, and its status is None.

    """
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory, name)
        program.write_bytes(zlib.decompress(base64.b64decode(data)))
        program.chmod(0o700)
        try:
            done = subprocess.run(
                [str(program)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=directory,
                timeout=limit_s,
            )
        except subprocess.TimeoutExpired as e:
            return {"status": None, "lines": _last_lines(e.stdout or b"")}
    return {"status": done.returncode, "lines": _last_lines(done.stdout)}


def _last_lines(output: bytes, most: int = 30) -> list[str]:
    return output.decode(errors="replace").splitlines()[-most:]
