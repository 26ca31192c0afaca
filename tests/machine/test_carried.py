import subprocess
import sys
from pathlib import Path

import harness

PACKAGES = ("svm", "machine")


def test_all_of_it_imports_without_any_package():
    """What is carried into a host has the standard library and nothing else."""
    root = Path(harness.__file__).parent
    names = [
        f"harness.{package}.{path.stem}"
        for package in PACKAGES
        for path in sorted((root / package).glob("*.py"))
        if path.stem != "__init__"
    ]
    assert "harness.machine.machine" in names
    code = f"import sys; sys.path.insert(0, {str(root.parent)!r}); import {', '.join(names)}"
    # -S: no site-packages; -I: no environment.
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
