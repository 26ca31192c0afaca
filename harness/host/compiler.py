"""The system's C compiler, for guests and for the C side of benchmarks."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from harness.errors import HostError

_NAMES = ("cc", "gcc", "clang")
_TIMEOUT_S = 120.0


class CompilerError(HostError):
    """There is no C compiler, or it refused something; one line says why."""


class Compiler:
    """The compiler that $CC names, else cc, gcc or clang.

    Raises CompilerError: there is none, or it does not work.
    """

    def __init__(self) -> None:
        wanted = [os.environ["CC"]] if os.environ.get("CC") else _NAMES
        found = next(filter(None, map(shutil.which, wanted)), None)
        if found is None:
            raise CompilerError(f"no C compiler found, looked for {', '.join(wanted)}")
        self.path = found
        self.version = self.run(["--version"], Path.cwd(), f"{found} --version").splitlines()[0]
        """Its first line, which tells builds by different compilers apart."""

    def run(self, arguments: Sequence[str], cwd: Path, what: str) -> str:
        """Run the compiler and return its output; `what` names the work in errors.

        Raises CompilerError: it refused, did not start, or did not end in time.
        """
        try:
            done = subprocess.run(
                [self.path, *arguments],
                cwd=cwd,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TIMEOUT_S,
                # Messages to read, and images without the time of the build.
                env={**os.environ, "LC_ALL": "C", "SOURCE_DATE_EPOCH": "0"},
            )
        except (OSError, subprocess.TimeoutExpired) as e:
            raise CompilerError(f"{self.path} for {what}: {e}") from e
        if done.returncode:
            raise CompilerError(f"{what}: {first_error(done.stderr)}")
        return done.stdout


def first_error(output: str) -> str:
    """Return the line that names the cause; the linker's have no "error" in them."""
    lines = [line for line in output.splitlines() if line and not line.startswith("collect2:")]
    causes = ("error", "undefined", "cannot find")
    marked = (line for line in lines if any(cause in line for cause in causes))
    return next(marked, lines[0] if lines else "it failed without a message")
