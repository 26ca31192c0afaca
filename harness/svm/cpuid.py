"""CPUID leaves that speak about SVM (APM vol. 3, appendix E)."""

from enum import IntEnum

from harness.svm.bits import Bits, bits


class Leaf(IntEnum):
    """CPUID functions that this project reads or changes."""

    VENDOR = 0x0000_0000
    FEATURES = 0x0000_0001
    STRUCTURED_FEATURES = 0x0000_0007
    TOPOLOGY = 0x0000_000B
    XSTATE = 0x0000_000D
    TOPOLOGY_V2 = 0x0000_001F
    KVM_SIGNATURE = 0x4000_0000
    EXTENDED = 0x8000_0000
    EXTENDED_FEATURES = 0x8000_0001
    ADDRESS_SIZES = 0x8000_0008
    SVM = 0x8000_000A
    EXTENDED_APIC_ID = 0x8000_001E
    EXTENDED_TOPOLOGY = 0x8000_0026


class FeaturesEcx(Bits):
    """CPUID 0000_0001 ECX, the bits about extended state."""

    F16C = bits(29)
    AVX = bits(28)
    OSXSAVE = bits(27)
    XSAVE = bits(26)
    FMA = bits(12)


class ExtendedFeaturesEcx(Bits):
    """CPUID 8000_0001 ECX, the bits about virtualization."""

    TOPOEXT = bits(22)
    SKINIT = bits(12)
    SVM = bits(2)


class ExtendedFeaturesEdx(Bits):
    """CPUID 8000_0001 EDX, the bits about long mode."""

    LM = bits(29)
    RDTSCP = bits(27)
    FFXSR = bits(25)
    NX = bits(20)


class StructuredFeaturesEbx(Bits):
    """CPUID 0000_0007 subleaf 0 EBX, the bits that intercepts or extended state depend on."""

    INVPCID = bits(10)
    AVX2 = bits(5)


class StructuredFeaturesEcx(Bits):
    """CPUID 0000_0007 subleaf 0 ECX, the bits about state that the VMCB or XSAVE has."""

    VPCLMULQDQ = bits(10)
    VAES = bits(9)
    SHSTK = bits(7)
    OSPKE = bits(4)
    PKU = bits(3)


class AddressSizesEbx(Bits):
    """CPUID 8000_0008 EBX, the bits that intercepts depend on."""

    RDPRU = bits(4)


class AddressSizesEax(Bits):
    """CPUID 8000_0008 EAX."""

    GUEST_PHYS = bits(23, 16)
    LINEAR = bits(15, 8)
    PHYSICAL = bits(7, 0)


class SvmFeaturesEdx(Bits):
    """CPUID 8000_000A EDX, SVM features; the kernel's names (cpufeatures.h) where it has one."""

    IDLE_HLT = bits(30)
    BUS_LOCK_THRESHOLD = bits(29)
    SVME_ADDR_CHK = bits(28)
    EXTLVT = bits(27)
    IBSVIRT = bits(26)
    VNMI = bits(25)
    TLBICTL = bits(24)
    HOST_MCE = bits(23)
    ROGPT = bits(21)
    V_SPEC_CTRL = bits(20)
    SSS_CHECK = bits(19)
    X2AVIC = bits(18)
    GMET = bits(17)
    VGIF = bits(16)
    V_VMSAVE_VMLOAD = bits(15)
    AVIC = bits(13)
    PFTHRESHOLD = bits(12)
    PAUSEFILTER = bits(10)
    DECODEASSISTS = bits(7)
    FLUSHBYASID = bits(6)
    VMCBCLEAN = bits(5)
    TSCRATEMSR = bits(4)
    NRIPS = bits(3)
    SVML = bits(2)
    LBRV = bits(1)
    NPT = bits(0)
