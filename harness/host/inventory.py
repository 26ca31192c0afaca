"""What a machine is: processor, memory, firmware, distribution. Standard library only."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

_DMI = Path("/sys/class/dmi/id")


def inventory(emit: Callable[..., None] | None = None) -> dict[str, Any]:
    """Return what results record of the machine that this runs on."""
    cpu = _first_processor()
    return {
        "host_name": socket.gethostname(),
        "silicon": cpu.get("model name", "unknown"),
        "microcode": cpu.get("microcode", ""),
        "cpus": os.cpu_count(),
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
        "board": " ".join(filter(None, map(_dmi, ("sys_vendor", "product_name")))),
        "firmware": " ".join(filter(None, map(_dmi, ("bios_vendor", "bios_version")))),
        "distribution": _distribution(),
    }


def _first_processor() -> dict[str, str]:
    values: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, colon, value = line.partition(":")
        if not colon:
            break
        values[name.strip()] = value.strip()
    return values


def _dmi(name: str) -> str:
    try:
        return (_DMI / name).read_text().strip()
    except OSError:
        return ""


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        return ""
