"""What guests and their driver agree on: ports, stages, commands, the shared page.

The only declaration; the guests' C header is generated from it.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum, IntFlag
from typing import Final

from harness.svm.vmcb import MSRPM_SIZE, VMCB_SIZE
from kvm_ioctl.cstruct import CStruct, u8, u32, u64

PAGE_SIZE: Final = 4096

SERIAL_PORT: Final = 0x3F8
"""First port of the 8250 UART; guests print here."""

DEBUG_EXIT_PORT: Final = 0xF4
"""A byte written here ends the machine, as on QEMU's isa-debug-exit."""

STAGE_PORT: Final = 0x5F0
"""A byte written here, a `Stage`, reports that this vCPU arrived there."""

HELLO_TEXT: Final = "hello from the guest\n"
HELLO_STATUS: Final = 42
"""What guest `hello` prints and then writes to DEBUG_EXIT_PORT."""

IMAGE_GPA: Final = 0x10_0000
"""Where guest images are linked to."""

CPU_AREAS_GPA: Final = 0x20_0000
"""The array of `cpu_area`, indexed by vCPU."""

MAX_VCPUS: Final = 64


class Stage(IntEnum):
    """Where a vCPU of guest `svme` stands."""

    READY = 1
    """All pages touched, SVME never set."""
    NO_SVM = 2
    """CPUID has no SVM; Command.TOGGLE attempts EFER.SVME=1 all the same."""
    SVME_ON = 3
    IN_L2 = 4
    """Reported by L2 itself: L2 is current while userspace handles the port write."""
    L2_EXITED = 5
    """L1 again, with L2's exit code in the report."""
    SVME_OFF = 6
    FAULT = 7
    """An exception; the report has vector, error code and rip."""
    DONE = 8


class Command(IntEnum):
    """What a vCPU does after a stage; read when it goes on, and reset to CONTINUE."""

    CONTINUE = 0
    TOGGLE = 1
    """At SVME_ON: clear SVME without running L2. At SVME_OFF and NO_SVM: set SVME (again)."""
    STOP = 2
    """Go to DONE. L2 does not obey it: it ends with its VMMCALL."""
    AGAIN = 3
    """Report the same stage once more."""
    RUN_L2 = 4
    """At L2_EXITED: VMRUN again, L2 goes on after its VMMCALL."""
    SPIN = 5
    """Spin without exits until the command changes."""


class Option(IntFlag):
    """Bits of `report.options`, set by userspace before the first run."""

    NO_NPT = 1
    """Run L2 without nested paging even where CPUID offers it."""


class Status(IntEnum):
    """What guest `svme` writes to DEBUG_EXIT_PORT."""

    OK = 0
    NO_SVM = 1
    FAULT = 2
    BAD_L2_EXIT = 3
    """L2 ended with another exit code than SVM_EXIT_VMMCALL."""


class report(CStruct):
    """The page that a vCPU shares with userspace."""

    _fields_ = (
        ("self_gpa", u64),
        ("index", u32),
        ("stage", u32),
        ("stage_count", u64),
        ("command", u32),
        ("options", u32),
        ("has_svm", u32),
        ("has_npt", u32),
        ("svm_features", u32),
        ("uses_npt", u32),
        ("level", u32),
        ("fault_vector", u32),
        ("fault_error", u64),
        ("fault_rip", u64),
        ("fault_cr2", u64),
        ("efer", u64),
        ("vmcb12_gpa", u64),
        ("exit_code", u64),
        ("exit_info_1", u64),
        ("exit_info_2", u64),
    )


class cpu_area(CStruct):
    """All pages that one vCPU of guest `svme` has to itself, apart from its stack in L1."""

    _fields_ = (
        ("report", report),
        ("report_pad", u8 * (PAGE_SIZE - ctypes.sizeof(report))),
        ("vmcb12", u8 * VMCB_SIZE),
        ("hsave", u8 * PAGE_SIZE),
        ("msrpm", u8 * MSRPM_SIZE),
        ("l2_stack", u8 * PAGE_SIZE),
    )


def cpu_area_gpa(index: int) -> int:
    """Return the guest-physical address of a vCPU's area.

    Raises ValueError: no such vCPU.
    """
    if not 0 <= index < MAX_VCPUS:
        raise ValueError(f"vCPU {index}: guests have areas for 0 to {MAX_VCPUS - 1}")
    return CPU_AREAS_GPA + index * ctypes.sizeof(cpu_area)
