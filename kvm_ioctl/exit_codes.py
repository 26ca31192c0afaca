"""Why KVM_RUN returned: numbers and flags (linux/kvm.h)."""

from __future__ import annotations

from enum import IntEnum, IntFlag


class ExitReason(IntEnum):
    """``kvm_run.exit_reason``; those of other architectures too."""

    KVM_EXIT_UNKNOWN = 0
    KVM_EXIT_EXCEPTION = 1
    KVM_EXIT_IO = 2
    KVM_EXIT_HYPERCALL = 3
    KVM_EXIT_DEBUG = 4
    KVM_EXIT_HLT = 5
    KVM_EXIT_MMIO = 6
    KVM_EXIT_IRQ_WINDOW_OPEN = 7
    KVM_EXIT_SHUTDOWN = 8
    KVM_EXIT_FAIL_ENTRY = 9
    KVM_EXIT_INTR = 10
    KVM_EXIT_SET_TPR = 11
    KVM_EXIT_TPR_ACCESS = 12
    KVM_EXIT_S390_SIEIC = 13
    KVM_EXIT_S390_RESET = 14
    KVM_EXIT_DCR = 15
    KVM_EXIT_NMI = 16
    KVM_EXIT_INTERNAL_ERROR = 17
    KVM_EXIT_OSI = 18
    KVM_EXIT_PAPR_HCALL = 19
    KVM_EXIT_S390_UCONTROL = 20
    KVM_EXIT_WATCHDOG = 21
    KVM_EXIT_S390_TSCH = 22
    KVM_EXIT_EPR = 23
    KVM_EXIT_SYSTEM_EVENT = 24
    KVM_EXIT_S390_STSI = 25
    KVM_EXIT_IOAPIC_EOI = 26
    KVM_EXIT_HYPERV = 27
    KVM_EXIT_ARM_NISV = 28
    KVM_EXIT_X86_RDMSR = 29
    KVM_EXIT_X86_WRMSR = 30
    KVM_EXIT_DIRTY_RING_FULL = 31
    KVM_EXIT_AP_RESET_HOLD = 32
    KVM_EXIT_X86_BUS_LOCK = 33
    KVM_EXIT_XEN = 34
    KVM_EXIT_RISCV_SBI = 35
    KVM_EXIT_RISCV_CSR = 36
    KVM_EXIT_NOTIFY = 37
    KVM_EXIT_LOONGARCH_IOCSR = 38
    KVM_EXIT_MEMORY_FAULT = 39
    KVM_EXIT_TDX = 40
    KVM_EXIT_ARM_SEA = 41
    KVM_EXIT_ARM_LDST64B = 42
    KVM_EXIT_SNP_REQ_CERTS = 43


class IoDirection(IntEnum):
    """``kvm_run.io.direction``."""

    KVM_EXIT_IO_IN = 0
    KVM_EXIT_IO_OUT = 1


class InternalError(IntEnum):
    """``kvm_run.internal.suberror`` of KVM_EXIT_INTERNAL_ERROR."""

    KVM_INTERNAL_ERROR_EMULATION = 1
    KVM_INTERNAL_ERROR_SIMUL_EX = 2
    KVM_INTERNAL_ERROR_DELIVERY_EV = 3
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON = 4


class EmulationFailureFlags(IntFlag):
    """``kvm_run.emulation_failure.flags``: what else is there."""

    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES = 1 << 0


class SystemEvent(IntEnum):
    """``kvm_run.system_event.type``."""

    KVM_SYSTEM_EVENT_SHUTDOWN = 1
    KVM_SYSTEM_EVENT_RESET = 2
    KVM_SYSTEM_EVENT_CRASH = 3
    KVM_SYSTEM_EVENT_WAKEUP = 4
    KVM_SYSTEM_EVENT_SUSPEND = 5
    KVM_SYSTEM_EVENT_SEV_TERM = 6
    KVM_SYSTEM_EVENT_TDX_FATAL = 7


class MsrExitReason(IntFlag):
    """``kvm_run.msr.reason``, and the argument of KVM_CAP_X86_USER_SPACE_MSR."""

    KVM_MSR_EXIT_REASON_INVAL = 1 << 0
    KVM_MSR_EXIT_REASON_UNKNOWN = 1 << 1
    KVM_MSR_EXIT_REASON_FILTER = 1 << 2


class HypervExitType(IntEnum):
    """``kvm_hyperv_exit.type``."""

    KVM_EXIT_HYPERV_SYNIC = 1
    KVM_EXIT_HYPERV_HCALL = 2
    KVM_EXIT_HYPERV_SYNDBG = 3


class XenExitType(IntEnum):
    """``kvm_xen_exit.type``."""

    KVM_EXIT_XEN_HCALL = 1


class HypercallFlags(IntFlag):
    """``kvm_run.hypercall.flags``."""

    KVM_EXIT_HYPERCALL_LONG_MODE = 1 << 0


class NotifyFlags(IntFlag):
    """``kvm_run.notify.flags``."""

    KVM_NOTIFY_CONTEXT_INVALID = 1 << 0


class MemoryFaultFlags(IntFlag):
    """``kvm_run.memory_fault.flags``."""

    KVM_MEMORY_EXIT_FLAG_PRIVATE = 1 << 3
