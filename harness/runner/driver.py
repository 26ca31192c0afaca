"""The machine that drives a run: what a report says of it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil

_CPUINFO = Path("/proc/cpuinfo")


def describe_machine() -> dict[str, str | int]:
    """Return its name, kernel, CPU, memory in MiB and Python."""
    return {
        "name": platform.node(),
        "kernel": platform.release(),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count() or 0,
        "memory_mib": psutil.virtual_memory().total >> 20,
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")
