"""What the model must be told of the CPU that a bench has, read from the host."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from harness.model.checks import QEMU_7_2, SILICON, cr4_reserved
from harness.model.facts import CpuFacts
from harness.svm.cpuid import Leaf
from kvm_ioctl.asm_kvm import kvm_cpuid_entry2

_BITS: Final[Mapping[str, tuple[Leaf, str, int]]] = {
    "svm": (Leaf.EXTENDED_FEATURES, "ecx", 2),
    "skinit": (Leaf.EXTENDED_FEATURES, "ecx", 12),
    "lm": (Leaf.EXTENDED_FEATURES, "edx", 29),
    "rdtscp": (Leaf.EXTENDED_FEATURES, "edx", 27),
    "ffxsr": (Leaf.EXTENDED_FEATURES, "edx", 25),
    "nx": (Leaf.EXTENDED_FEATURES, "edx", 20),
    "xsave": (Leaf.FEATURES, "ecx", 26),
    "invpcid": (Leaf.STRUCTURED_FEATURES, "ebx", 10),
    "shstk": (Leaf.STRUCTURED_FEATURES, "ecx", 7),
    "rdpru": (Leaf.ADDRESS_SIZES, "ebx", 4),
    "npt": (Leaf.SVM, "edx", 0),
    "lbrv": (Leaf.SVM, "edx", 1),
    "nrips": (Leaf.SVM, "edx", 3),
    "pause_filter": (Leaf.SVM, "edx", 10),
    "pf_threshold": (Leaf.SVM, "edx", 12),
    "vgif": (Leaf.SVM, "edx", 16),
    "vnmi": (Leaf.SVM, "edx", 25),
}
"""Features of `CpuFacts` by leaf, register and bit (APM vol. 3, appendix E)."""

_AUTOIBRS: Final = (0x8000_0021, "eax", 8)
_SEV_ES: Final = (0x8000_001F, "eax", 3)
_NO_LMSLE: Final = (Leaf.ADDRESS_SIZES, "ebx", 20)

_CR4: Final[Mapping[str, tuple[int, str, int]]] = {
    "fsgsbase": (7, "ebx", 0),
    "smep": (7, "ebx", 7),
    "smap": (7, "ebx", 20),
    "umip": (7, "ecx", 2),
    "pku": (7, "ecx", 3),
    "la57": (7, "ecx", 16),
    "shstk": (7, "ecx", 7),
    "pcid": (1, "ecx", 17),
    "xsave": (1, "ecx", 26),
}
"""Features with a bit in CR4, by leaf, register and bit."""


def cpu_facts(entries: Iterable[kvm_cpuid_entry2]) -> CpuFacts:
    """Return the facts of a vCPU with this CPUID on this host."""
    found = list(entries)

    def bit(place: tuple[int, str, int]) -> bool:
        leaf, register, number = place
        return any(
            entry.function == leaf and entry.index == 0 and getattr(entry, register) >> number & 1
            for entry in found
        )

    sizes = next((e.eax for e in found if e.function == Leaf.ADDRESS_SIZES), 36)
    features: dict[str, Any] = {name: bit(place) for name, place in _BITS.items()}
    silicon = silicon_of(Path("/proc/cpuinfo").read_text())
    return CpuFacts(
        maxphyaddr=sizes & 0xFF,
        autoibrs=bit(_AUTOIBRS),
        lmsle=not bit(_NO_LMSLE),
        cr4_reserved=cr4_reserved([name for name, place in _CR4.items() if bit(place)]),
        nested=_is_on("nested"),
        npt_on_l0=_is_on("npt"),
        vgif_on_l0=_is_on("vgif"),
        sev_es=bit(_SEV_ES),
        silicon=silicon,
        loads_shadow=silicon == SILICON,
        loads_cpl=silicon == SILICON,
        **features,
    )


def silicon_of(cpuinfo: str) -> str:
    """Return by which list of `harness.model.checks` a CPU refuses a VMCB, by /proc/cpuinfo.

    QEMU's TCG names itself there.
    """
    return QEMU_7_2 if "QEMU TCG CPU" in cpuinfo else SILICON


def is_emulated() -> bool:
    """Tell whether this host's CPU is QEMU's TCG."""
    return silicon_of(Path("/proc/cpuinfo").read_text()) == QEMU_7_2


def _is_on(param: str) -> bool:
    try:
        value = Path(f"/sys/module/kvm_amd/parameters/{param}").read_text()
    except OSError:
        return False
    return value.strip() in ("1", "Y")
