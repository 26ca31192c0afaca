"""Exit codes of #VMEXIT (APM vol. 2, appendix C; kernel: uapi/asm/svm.h)."""

from enum import IntEnum

VMEXIT_INVALID = 0xFFFF_FFFF_FFFF_FFFF
"""VMCB exit_code when VMRUN refused the guest state: -1 over both words (SVM_EXIT_ERR)."""


class ExitCode(IntEnum):
    """VMCB exit_code as the CPU writes it; ranges of registers and exceptions by first and last."""

    SVM_EXIT_READ_CR0 = 0x000
    SVM_EXIT_READ_CR2 = 0x002
    SVM_EXIT_READ_CR3 = 0x003
    SVM_EXIT_READ_CR4 = 0x004
    SVM_EXIT_READ_CR8 = 0x008
    SVM_EXIT_WRITE_CR0 = 0x010
    SVM_EXIT_WRITE_CR2 = 0x012
    SVM_EXIT_WRITE_CR3 = 0x013
    SVM_EXIT_WRITE_CR4 = 0x014
    SVM_EXIT_WRITE_CR8 = 0x018
    SVM_EXIT_READ_DR0 = 0x020
    SVM_EXIT_READ_DR1 = 0x021
    SVM_EXIT_READ_DR2 = 0x022
    SVM_EXIT_READ_DR3 = 0x023
    SVM_EXIT_READ_DR4 = 0x024
    SVM_EXIT_READ_DR5 = 0x025
    SVM_EXIT_READ_DR6 = 0x026
    SVM_EXIT_READ_DR7 = 0x027
    SVM_EXIT_WRITE_DR0 = 0x030
    SVM_EXIT_WRITE_DR1 = 0x031
    SVM_EXIT_WRITE_DR2 = 0x032
    SVM_EXIT_WRITE_DR3 = 0x033
    SVM_EXIT_WRITE_DR4 = 0x034
    SVM_EXIT_WRITE_DR5 = 0x035
    SVM_EXIT_WRITE_DR6 = 0x036
    SVM_EXIT_WRITE_DR7 = 0x037
    SVM_EXIT_EXCP_BASE = 0x040
    SVM_EXIT_LAST_EXCP = 0x05F
    SVM_EXIT_INTR = 0x060
    SVM_EXIT_NMI = 0x061
    SVM_EXIT_SMI = 0x062
    SVM_EXIT_INIT = 0x063
    SVM_EXIT_VINTR = 0x064
    SVM_EXIT_CR0_SEL_WRITE = 0x065
    SVM_EXIT_IDTR_READ = 0x066
    SVM_EXIT_GDTR_READ = 0x067
    SVM_EXIT_LDTR_READ = 0x068
    SVM_EXIT_TR_READ = 0x069
    SVM_EXIT_IDTR_WRITE = 0x06A
    SVM_EXIT_GDTR_WRITE = 0x06B
    SVM_EXIT_LDTR_WRITE = 0x06C
    SVM_EXIT_TR_WRITE = 0x06D
    SVM_EXIT_RDTSC = 0x06E
    SVM_EXIT_RDPMC = 0x06F
    SVM_EXIT_PUSHF = 0x070
    SVM_EXIT_POPF = 0x071
    SVM_EXIT_CPUID = 0x072
    SVM_EXIT_RSM = 0x073
    SVM_EXIT_IRET = 0x074
    SVM_EXIT_SWINT = 0x075
    SVM_EXIT_INVD = 0x076
    SVM_EXIT_PAUSE = 0x077
    SVM_EXIT_HLT = 0x078
    SVM_EXIT_INVLPG = 0x079
    SVM_EXIT_INVLPGA = 0x07A
    SVM_EXIT_IOIO = 0x07B
    SVM_EXIT_MSR = 0x07C
    SVM_EXIT_TASK_SWITCH = 0x07D
    SVM_EXIT_FERR_FREEZE = 0x07E
    SVM_EXIT_SHUTDOWN = 0x07F
    SVM_EXIT_VMRUN = 0x080
    SVM_EXIT_VMMCALL = 0x081
    SVM_EXIT_VMLOAD = 0x082
    SVM_EXIT_VMSAVE = 0x083
    SVM_EXIT_STGI = 0x084
    SVM_EXIT_CLGI = 0x085
    SVM_EXIT_SKINIT = 0x086
    SVM_EXIT_RDTSCP = 0x087
    SVM_EXIT_ICEBP = 0x088
    SVM_EXIT_WBINVD = 0x089
    SVM_EXIT_MONITOR = 0x08A
    SVM_EXIT_MWAIT = 0x08B
    SVM_EXIT_MWAIT_COND = 0x08C
    SVM_EXIT_XSETBV = 0x08D
    SVM_EXIT_RDPRU = 0x08E
    SVM_EXIT_EFER_WRITE_TRAP = 0x08F
    SVM_EXIT_CR0_WRITE_TRAP = 0x090
    SVM_EXIT_CR4_WRITE_TRAP = 0x094
    SVM_EXIT_CR8_WRITE_TRAP = 0x098
    SVM_EXIT_INVPCID = 0x0A2
    SVM_EXIT_BUS_LOCK = 0x0A5
    SVM_EXIT_IDLE_HLT = 0x0A6
    SVM_EXIT_NPF = 0x400
    SVM_EXIT_AVIC_INCOMPLETE_IPI = 0x401
    SVM_EXIT_AVIC_UNACCELERATED_ACCESS = 0x402
    SVM_EXIT_VMGEXIT = 0x403
    SVM_EXIT_SW = 0xF000_0000
    """What KVM writes into vmcb12 when an SMI takes L2 (not an exit of the CPU)."""


def describe(exit_code: int) -> str:
    """Return the kernel's name of an exit code, or the number if it has none."""
    first, last = ExitCode.SVM_EXIT_EXCP_BASE, ExitCode.SVM_EXIT_LAST_EXCP
    if first <= exit_code <= last:
        return f"SVM_EXIT_EXCP_BASE+{exit_code - first}"
    if exit_code == VMEXIT_INVALID:
        return "VMEXIT_INVALID"
    try:
        return ExitCode(exit_code).name
    except ValueError:
        return f"exit code {exit_code:#x}"
