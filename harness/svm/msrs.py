"""Model-specific registers that SVM and its guests use (APM vol. 2, appendix A; msr-index.h)."""

from enum import IntEnum

from harness.svm.bits import Bits, bits


class Msr(IntEnum):
    """MSR numbers."""

    MSR_IA32_TSC = 0x0000_0010
    MSR_IA32_APICBASE = 0x0000_001B
    MSR_SMI_COUNT = 0x0000_0034
    MSR_IA32_SMBASE = 0x0000_009E
    MSR_IA32_SYSENTER_CS = 0x0000_0174
    MSR_IA32_SYSENTER_ESP = 0x0000_0175
    MSR_IA32_SYSENTER_EIP = 0x0000_0176
    MSR_IA32_DEBUGCTLMSR = 0x0000_01D9
    MSR_IA32_CR_PAT = 0x0000_0277
    MSR_IA32_S_CET = 0x0000_06A2
    MSR_EFER = 0xC000_0080
    MSR_STAR = 0xC000_0081
    MSR_LSTAR = 0xC000_0082
    MSR_CSTAR = 0xC000_0083
    MSR_SYSCALL_MASK = 0xC000_0084
    MSR_FS_BASE = 0xC000_0100
    MSR_GS_BASE = 0xC000_0101
    MSR_KERNEL_GS_BASE = 0xC000_0102
    MSR_TSC_AUX = 0xC000_0103
    MSR_AMD64_TSC_RATIO = 0xC000_0104
    MSR_VM_CR = 0xC001_0114
    MSR_VM_IGNNE = 0xC001_0115
    MSR_VM_HSAVE_PA = 0xC001_0117


class Efer(Bits):
    """MSR_EFER (APM vol. 2, 3.1.7 Extended Feature Enable Register)."""

    AUTOIBRS = bits(21)
    TCE = bits(15)
    FFXSR = bits(14)
    LMSLE = bits(13)
    SVME = bits(12)
    NX = bits(11)
    LMA = bits(10)
    LME = bits(8)
    SCE = bits(0)


class VmCr(Bits):
    """MSR_VM_CR (APM vol. 2, 15.30.1 VM_CR MSR)."""

    SVMDIS = bits(4)
    LOCK = bits(3)
    DIS_A20M = bits(2)
    R_INIT = bits(1)
    DPD = bits(0)


class Cr0(Bits):
    """CR0 (APM vol. 2, 3.1.1 CR0 Register)."""

    PG = bits(31)
    CD = bits(30)
    NW = bits(29)
    AM = bits(18)
    WP = bits(16)
    NE = bits(5)
    ET = bits(4)
    TS = bits(3)
    EM = bits(2)
    MP = bits(1)
    PE = bits(0)


class Cr4(Bits):
    """CR4 (APM vol. 2, 3.1.3 CR4 Register)."""

    CET = bits(23)
    PKE = bits(22)
    SMAP = bits(21)
    SMEP = bits(20)
    OSXSAVE = bits(18)
    PCIDE = bits(17)
    FSGSBASE = bits(16)
    LA57 = bits(12)
    UMIP = bits(11)
    OSXMMEXCPT = bits(10)
    OSFXSR = bits(9)
    PCE = bits(8)
    PGE = bits(7)
    MCE = bits(6)
    PAE = bits(5)
    PSE = bits(4)
    DE = bits(3)
    TSD = bits(2)
    PVI = bits(1)
    VME = bits(0)
