"""Structs and constants of asm/kvm.h (x86), but for Xen, SEV and TDX."""

from __future__ import annotations

from enum import IntEnum, IntFlag

from kvm_ioctl.cstruct import (
    CStruct,
    CUnion,
    FlexArray,
    FlexInts,
    s32,
    s64,
    u8,
    u16,
    u32,
    u64,
    void_p,
)

KVM_PIO_PAGE_OFFSET = 1
KVM_COALESCED_MMIO_PAGE_OFFSET = 2
KVM_DIRTY_LOG_PAGE_OFFSET = 64
KVM_NR_INTERRUPTS = 0x100
KVM_IOAPIC_NUM_PINS = 24
KVM_NR_IRQCHIPS = 3
KVM_APIC_REG_SIZE = 0x400
KVM_MSR_FILTER_MAX_BITMAP_SIZE = 0x600
KVM_MSR_FILTER_MAX_RANGES = 16
KVM_MAX_XCRS = 16
KVM_REG_GUEST_SSP = 0
KVM_STATE_NESTED_VMX_VMCS_SIZE = 0x1000
KVM_STATE_NESTED_SVM_VMCB_SIZE = 0x1000
KVM_X86_XCOMP_GUEST_SUPP = 0
KVM_X86_SEV_VMSA_FEATURES = 0
KVM_X86_SNP_POLICY_BITS = 1
KVM_X86_SEV_SNP_REQ_CERTS = 2
KVM_HYPERV_CONN_ID_MASK = 0xFFFFFF
KVM_HYPERV_EVENTFD_DEASSIGN = 1
KVM_VCPU_TSC_CTRL = 0
KVM_VCPU_TSC_OFFSET = 0
KVM_PMU_MASKED_ENTRY_EVENT_SELECT = 0xF000000FF
KVM_PMU_MASKED_ENTRY_UMASK_MASK = 0xFF00000000000000
KVM_PMU_MASKED_ENTRY_UMASK_MATCH = 0xFF00
KVM_PMU_MASKED_ENTRY_EXCLUDE = 0x80000000000000
KVM_PMU_MASKED_ENTRY_UMASK_MASK_SHIFT = 56


class Vector(IntEnum):
    """Exception vectors."""

    DE_VECTOR = 0
    DB_VECTOR = 1
    BP_VECTOR = 3
    OF_VECTOR = 4
    BR_VECTOR = 5
    UD_VECTOR = 6
    NM_VECTOR = 7
    DF_VECTOR = 8
    TS_VECTOR = 10
    NP_VECTOR = 11
    SS_VECTOR = 12
    GP_VECTOR = 13
    PF_VECTOR = 14
    MF_VECTOR = 16
    AC_VECTOR = 17
    MC_VECTOR = 18
    XM_VECTOR = 19
    VE_VECTOR = 20
    CP_VECTOR = 21
    HV_VECTOR = 28
    VC_VECTOR = 29
    SX_VECTOR = 30


class IrqchipId(IntEnum):
    """``kvm_irqchip.chip_id``."""

    KVM_IRQCHIP_PIC_MASTER = 0
    KVM_IRQCHIP_PIC_SLAVE = 1
    KVM_IRQCHIP_IOAPIC = 2


class RunFlags(IntFlag):
    """``kvm_run.flags`` on x86."""

    KVM_RUN_X86_SMM = 1 << 0
    KVM_RUN_X86_BUS_LOCK = 1 << 1
    KVM_RUN_X86_GUEST_MODE = 1 << 2


class Sregs2Flags(IntFlag):
    """``kvm_sregs2.flags``."""

    KVM_SREGS2_FLAGS_PDPTRS_VALID = 1 << 0


class MsrFilterRangeFlags(IntFlag):
    """``kvm_msr_filter_range.flags``: the accesses that the bitmap decides."""

    KVM_MSR_FILTER_READ = 1 << 0
    KVM_MSR_FILTER_WRITE = 1 << 1


class MsrFilterFlags(IntFlag):
    """``kvm_msr_filter.flags``: what happens to MSRs in no range."""

    KVM_MSR_FILTER_DEFAULT_ALLOW = 0x0
    KVM_MSR_FILTER_DEFAULT_DENY = 1 << 0


class CpuidFlags(IntFlag):
    """``kvm_cpuid_entry2.flags``; the second word is spelled as in the kernel."""

    KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1 << 0
    KVM_CPUID_FLAG_STATEFUL_FUNC = 1 << 1
    KVM_CPUID_FLAG_STATE_READ_NEXT = 1 << 2


class PitFlags(IntFlag):
    """``kvm_pit_state2.flags``."""

    KVM_PIT_FLAGS_HPET_LEGACY = 1 << 0
    KVM_PIT_FLAGS_SPEAKER_DATA_ON = 1 << 1


class VcpuEventFlags(IntFlag):
    """``kvm_vcpu_events.flags``: which fields KVM_SET_VCPU_EVENTS takes."""

    KVM_VCPUEVENT_VALID_NMI_PENDING = 1 << 0
    KVM_VCPUEVENT_VALID_SIPI_VECTOR = 1 << 1
    KVM_VCPUEVENT_VALID_SHADOW = 1 << 2
    KVM_VCPUEVENT_VALID_SMM = 1 << 3
    KVM_VCPUEVENT_VALID_PAYLOAD = 1 << 4
    KVM_VCPUEVENT_VALID_TRIPLE_FAULT = 1 << 5


class InterruptShadow(IntFlag):
    """``kvm_vcpu_events.interrupt.shadow``."""

    KVM_X86_SHADOW_INT_MOV_SS = 1 << 0
    KVM_X86_SHADOW_INT_STI = 1 << 1


class X86RegType(IntEnum):
    """Register types of KVM_GET_ONE_REG ids on x86."""

    KVM_X86_REG_TYPE_MSR = 2
    KVM_X86_REG_TYPE_KVM = 3


class SyncRegs(IntFlag):
    """``kvm_run.kvm_valid_regs`` and ``kvm_dirty_regs`` (KVM_CAP_SYNC_REGS)."""

    KVM_SYNC_X86_REGS = 1 << 0
    KVM_SYNC_X86_SREGS = 1 << 1
    KVM_SYNC_X86_EVENTS = 1 << 2


class Quirks(IntFlag):
    """Arguments of KVM_CAP_DISABLE_QUIRKS and KVM_CAP_DISABLE_QUIRKS2."""

    KVM_X86_QUIRK_LINT0_REENABLED = 1 << 0
    KVM_X86_QUIRK_CD_NW_CLEARED = 1 << 1
    KVM_X86_QUIRK_LAPIC_MMIO_HOLE = 1 << 2
    KVM_X86_QUIRK_OUT_7E_INC_RIP = 1 << 3
    KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT = 1 << 4
    KVM_X86_QUIRK_FIX_HYPERCALL_INSN = 1 << 5
    KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS = 1 << 6
    KVM_X86_QUIRK_SLOT_ZAP_ALL = 1 << 7
    KVM_X86_QUIRK_STUFF_FEATURE_MSRS = 1 << 8
    KVM_X86_QUIRK_IGNORE_GUEST_PAT = 1 << 9
    KVM_X86_QUIRK_VMCS12_ALLOW_FREEZE_IN_SMM = 1 << 10
    KVM_X86_QUIRK_NESTED_SVM_SHARED_PAT = 1 << 11


class NestedFormat(IntEnum):
    """``kvm_nested_state.format``."""

    KVM_STATE_NESTED_FORMAT_VMX = 0
    KVM_STATE_NESTED_FORMAT_SVM = 1


class NestedStateFlags(IntFlag):
    """``kvm_nested_state.flags``."""

    KVM_STATE_NESTED_GUEST_MODE = 1 << 0
    KVM_STATE_NESTED_RUN_PENDING = 1 << 1
    KVM_STATE_NESTED_EVMCS = 1 << 2
    KVM_STATE_NESTED_MTF_PENDING = 1 << 3
    KVM_STATE_NESTED_GIF_SET = 1 << 8


class VmxNestedSmmFlags(IntFlag):
    """``kvm_vmx_nested_state_hdr.smm.flags``."""

    KVM_STATE_NESTED_SMM_GUEST_MODE = 1 << 0
    KVM_STATE_NESTED_SMM_VMXON = 1 << 1


class VmxNestedFlags(IntFlag):
    """``kvm_vmx_nested_state_hdr.flags``."""

    KVM_STATE_VMX_PREEMPTION_TIMER_DEADLINE = 1 << 0


class SystemAttrGroup(IntEnum):
    """Groups of KVM_GET_DEVICE_ATTR on the system fd (KVM_CAP_SYS_ATTRIBUTES)."""

    KVM_X86_GRP_SYSTEM = 0
    KVM_X86_GRP_SEV = 1


class PmuEventAction(IntEnum):
    """``kvm_pmu_event_filter.action``."""

    KVM_PMU_EVENT_ALLOW = 0
    KVM_PMU_EVENT_DENY = 1


class PmuEventFlags(IntFlag):
    """``kvm_pmu_event_filter.flags``."""

    KVM_PMU_EVENT_FLAG_MASKED_EVENTS = 1 << 0


class X2apicApiFlags(IntFlag):
    """Argument of KVM_CAP_X2APIC_API."""

    KVM_X2APIC_API_USE_32BIT_IDS = 1 << 0
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK = 1 << 1
    KVM_X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST = 1 << 2
    KVM_X2APIC_DISABLE_SUPPRESS_EOI_BROADCAST = 1 << 3


class VmType(IntEnum):
    """Argument of KVM_CREATE_VM (KVM_CAP_VM_TYPES)."""

    KVM_X86_DEFAULT_VM = 0
    KVM_X86_SW_PROTECTED_VM = 1
    KVM_X86_SEV_VM = 2
    KVM_X86_SEV_ES_VM = 3
    KVM_X86_SNP_VM = 4
    KVM_X86_TDX_VM = 5


class kvm_pic_state(CStruct):
    """One of the two 8259 interrupt controllers."""

    header = "asm/kvm.h"
    _fields_ = [
        ("last_irr", u8),
        ("irr", u8),
        ("imr", u8),
        ("isr", u8),
        ("priority_add", u8),
        ("irq_base", u8),
        ("read_reg_select", u8),
        ("poll", u8),
        ("special_mask", u8),
        ("init_state", u8),
        ("auto_eoi", u8),
        ("rotate_on_auto_eoi", u8),
        ("special_fully_nested_mode", u8),
        ("init4", u8),
        ("elcr", u8),
        ("elcr_mask", u8),
    ]


class _kvm_ioapic_state_redirtbl_fields(CStruct):
    _fields_ = [
        ("vector", u8),
        ("delivery_mode", u8, 3),
        ("dest_mode", u8, 1),
        ("delivery_status", u8, 1),
        ("polarity", u8, 1),
        ("remote_irr", u8, 1),
        ("trig_mode", u8, 1),
        ("mask", u8, 1),
        ("reserve", u8, 7),
        ("reserved", u8 * 4),
        ("dest_id", u8),
    ]


class _kvm_ioapic_state_redirtbl(CUnion):
    _fields_ = [
        ("bits", u64),
        ("fields", _kvm_ioapic_state_redirtbl_fields),
    ]


class kvm_ioapic_state(CStruct):
    """The I/O APIC."""

    header = "asm/kvm.h"
    _fields_ = [
        ("base_address", u64),
        ("ioregsel", u32),
        ("id", u32),
        ("irr", u32),
        ("pad", u32),
        ("redirtbl", _kvm_ioapic_state_redirtbl * KVM_IOAPIC_NUM_PINS),
    ]


class kvm_regs(CStruct):
    """General registers, RIP and RFLAGS of one vCPU."""

    header = "asm/kvm.h"
    _fields_ = [
        ("rax", u64),
        ("rbx", u64),
        ("rcx", u64),
        ("rdx", u64),
        ("rsi", u64),
        ("rdi", u64),
        ("rsp", u64),
        ("rbp", u64),
        ("r8", u64),
        ("r9", u64),
        ("r10", u64),
        ("r11", u64),
        ("r12", u64),
        ("r13", u64),
        ("r14", u64),
        ("r15", u64),
        ("rip", u64),
        ("rflags", u64),
    ]


class kvm_lapic_state(CStruct):
    """The registers of a local APIC, as in its 1 KiB page."""

    header = "asm/kvm.h"
    _fields_ = [
        ("regs", u8 * KVM_APIC_REG_SIZE),
    ]


class kvm_segment(CStruct):
    """A segment register with its hidden part."""

    header = "asm/kvm.h"
    _fields_ = [
        ("base", u64),
        ("limit", u32),
        ("selector", u16),
        ("type", u8),
        ("present", u8),
        ("dpl", u8),
        ("db", u8),
        ("s", u8),
        ("l", u8),
        ("g", u8),
        ("avl", u8),
        ("unusable", u8),
        ("padding", u8),
    ]


class kvm_dtable(CStruct):
    """GDTR or IDTR."""

    header = "asm/kvm.h"
    _fields_ = [
        ("base", u64),
        ("limit", u16),
        ("padding", u16 * 3),
    ]


class kvm_sregs(CStruct):
    """Segment, descriptor-table and control registers of one vCPU."""

    header = "asm/kvm.h"
    _fields_ = [
        ("cs", kvm_segment),
        ("ds", kvm_segment),
        ("es", kvm_segment),
        ("fs", kvm_segment),
        ("gs", kvm_segment),
        ("ss", kvm_segment),
        ("tr", kvm_segment),
        ("ldt", kvm_segment),
        ("gdt", kvm_dtable),
        ("idt", kvm_dtable),
        ("cr0", u64),
        ("cr2", u64),
        ("cr3", u64),
        ("cr4", u64),
        ("cr8", u64),
        ("efer", u64),
        ("apic_base", u64),
        ("interrupt_bitmap", u64 * ((KVM_NR_INTERRUPTS + 63) // 64)),
    ]


class kvm_sregs2(CStruct):
    """``kvm_sregs`` with the PDPTRs, and without the interrupt bitmap."""

    header = "asm/kvm.h"
    _fields_ = [
        ("cs", kvm_segment),
        ("ds", kvm_segment),
        ("es", kvm_segment),
        ("fs", kvm_segment),
        ("gs", kvm_segment),
        ("ss", kvm_segment),
        ("tr", kvm_segment),
        ("ldt", kvm_segment),
        ("gdt", kvm_dtable),
        ("idt", kvm_dtable),
        ("cr0", u64),
        ("cr2", u64),
        ("cr3", u64),
        ("cr4", u64),
        ("cr8", u64),
        ("efer", u64),
        ("apic_base", u64),
        ("flags", u64),
        ("pdptrs", u64 * 4),
    ]


class kvm_fpu(CStruct):
    """x87 and SSE registers."""

    header = "asm/kvm.h"
    _fields_ = [
        ("fpr", u8 * 16 * 8),
        ("fcw", u16),
        ("fsw", u16),
        ("ftwx", u8),
        ("pad1", u8),
        ("last_opcode", u16),
        ("last_ip", u64),
        ("last_dp", u64),
        ("xmm", u8 * 16 * 16),
        ("mxcsr", u32),
        ("pad2", u32),
    ]


class kvm_msr_entry(CStruct):
    """One MSR and its value."""

    header = "asm/kvm.h"
    _fields_ = [
        ("index", u32),
        ("reserved", u32),
        ("data", u64),
    ]


class kvm_msrs(CStruct):
    """MSRs to get or set."""

    header = "asm/kvm.h"
    _fields_ = [
        ("nmsrs", u32),
        ("pad", u32),
    ]
    entries = FlexArray(kvm_msr_entry, count="nmsrs")


class kvm_msr_list(CStruct):
    """MSR indices."""

    header = "asm/kvm.h"
    _fields_ = [
        ("nmsrs", u32),
    ]
    indices = FlexInts(u32, count="nmsrs")


class kvm_msr_filter_range(CStruct):
    """A range of MSRs with one bit each: 1 allows the access."""

    header = "asm/kvm.h"
    _fields_ = [
        ("flags", u32),
        ("nmsrs", u32),
        ("base", u32),
        ("bitmap", void_p),
    ]


class kvm_msr_filter(CStruct):
    """Which MSR accesses of the guest are denied."""

    header = "asm/kvm.h"
    _fields_ = [
        ("flags", u32),
        ("ranges", kvm_msr_filter_range * KVM_MSR_FILTER_MAX_RANGES),
    ]


class kvm_cpuid_entry(CStruct):
    """One CPUID leaf, for KVM_SET_CPUID."""

    header = "asm/kvm.h"
    _fields_ = [
        ("function", u32),
        ("eax", u32),
        ("ebx", u32),
        ("ecx", u32),
        ("edx", u32),
        ("padding", u32),
    ]


class kvm_cpuid(CStruct):
    """CPUID leaves, for KVM_SET_CPUID."""

    header = "asm/kvm.h"
    _fields_ = [
        ("nent", u32),
        ("padding", u32),
    ]
    entries = FlexArray(kvm_cpuid_entry, count="nent")


class kvm_cpuid_entry2(CStruct):
    """One CPUID leaf or subleaf."""

    header = "asm/kvm.h"
    _fields_ = [
        ("function", u32),
        ("index", u32),
        ("flags", u32),
        ("eax", u32),
        ("ebx", u32),
        ("ecx", u32),
        ("edx", u32),
        ("padding", u32 * 3),
    ]


class kvm_cpuid2(CStruct):
    """CPUID leaves and subleaves."""

    header = "asm/kvm.h"
    _fields_ = [
        ("nent", u32),
        ("padding", u32),
    ]
    entries = FlexArray(kvm_cpuid_entry2, count="nent")


class kvm_pit_channel_state(CStruct):
    """One of the three channels of the 8254 timer."""

    header = "asm/kvm.h"
    _fields_ = [
        ("count", u32),
        ("latched_count", u16),
        ("count_latched", u8),
        ("status_latched", u8),
        ("status", u8),
        ("read_state", u8),
        ("write_state", u8),
        ("write_latch", u8),
        ("rw_mode", u8),
        ("mode", u8),
        ("bcd", u8),
        ("gate", u8),
        ("count_load_time", s64),
    ]


class kvm_debug_exit_arch(CStruct):
    """What KVM_EXIT_DEBUG says."""

    header = "asm/kvm.h"
    _fields_ = [
        ("exception", u32),
        ("pad", u32),
        ("pc", u64),
        ("dr6", u64),
        ("dr7", u64),
    ]


class kvm_guest_debug_arch(CStruct):
    """Debug registers for KVM_SET_GUEST_DEBUG."""

    header = "asm/kvm.h"
    _fields_ = [
        ("debugreg", u64 * 8),
    ]


class kvm_pit_state(CStruct):
    """The 8254 timer, without flags."""

    header = "asm/kvm.h"
    _fields_ = [
        ("channels", kvm_pit_channel_state * 3),
    ]


class kvm_pit_state2(CStruct):
    """The 8254 timer."""

    header = "asm/kvm.h"
    _fields_ = [
        ("channels", kvm_pit_channel_state * 3),
        ("flags", u32),
        ("reserved", u32 * 9),
    ]


class kvm_reinject_control(CStruct):
    """Whether lost timer ticks are injected again."""

    header = "asm/kvm.h"
    _fields_ = [
        ("pit_reinject", u8),
        ("reserved", u8 * 31),
    ]


class _kvm_vcpu_events_exception(CStruct):
    _fields_ = [
        ("injected", u8),
        ("nr", u8),
        ("has_error_code", u8),
        ("pending", u8),
        ("error_code", u32),
    ]


class _kvm_vcpu_events_interrupt(CStruct):
    _fields_ = [
        ("injected", u8),
        ("nr", u8),
        ("soft", u8),
        ("shadow", u8),
    ]


class _kvm_vcpu_events_nmi(CStruct):
    _fields_ = [
        ("injected", u8),
        ("pending", u8),
        ("masked", u8),
        ("pad", u8),
    ]


class _kvm_vcpu_events_smi(CStruct):
    _fields_ = [
        ("smm", u8),
        ("pending", u8),
        ("smm_inside_nmi", u8),
        ("latched_init", u8),
    ]


class _kvm_vcpu_events_triple_fault(CStruct):
    _fields_ = [
        ("pending", u8),
    ]


class kvm_vcpu_events(CStruct):
    """Pending and injected exceptions, interrupts, NMIs, SMIs."""

    header = "asm/kvm.h"
    _fields_ = [
        ("exception", _kvm_vcpu_events_exception),
        ("interrupt", _kvm_vcpu_events_interrupt),
        ("nmi", _kvm_vcpu_events_nmi),
        ("sipi_vector", u32),
        ("flags", u32),
        ("smi", _kvm_vcpu_events_smi),
        ("triple_fault", _kvm_vcpu_events_triple_fault),
        ("reserved", u8 * 26),
        ("exception_has_payload", u8),
        ("exception_payload", u64),
    ]


class kvm_debugregs(CStruct):
    """Debug registers of one vCPU."""

    header = "asm/kvm.h"
    _fields_ = [
        ("db", u64 * 4),
        ("dr6", u64),
        ("dr7", u64),
        ("flags", u64),
        ("reserved", u64 * 9),
    ]


class kvm_xsave(CStruct):
    """The XSAVE area; KVM_CAP_XSAVE2 says how long it is."""

    header = "asm/kvm.h"
    _fields_ = [
        ("region", u32 * 1024),
    ]
    extra = FlexInts(u32)


class kvm_xcr(CStruct):
    """One extended control register."""

    header = "asm/kvm.h"
    _fields_ = [
        ("xcr", u32),
        ("reserved", u32),
        ("value", u64),
    ]


class kvm_xcrs(CStruct):
    """The extended control registers."""

    header = "asm/kvm.h"
    _fields_ = [
        ("nr_xcrs", u32),
        ("flags", u32),
        ("xcrs", kvm_xcr * KVM_MAX_XCRS),
        ("padding", u64 * 16),
    ]


class kvm_sync_regs(CStruct):
    """Registers exchanged through ``kvm_run``."""

    header = "asm/kvm.h"
    _fields_ = [
        ("regs", kvm_regs),
        ("sregs", kvm_sregs),
        ("events", kvm_vcpu_events),
    ]


class kvm_vmx_nested_state_data(CStruct):
    """Nested VMX state: the data part."""

    header = "asm/kvm.h"
    _fields_ = [
        ("vmcs12", u8 * KVM_STATE_NESTED_VMX_VMCS_SIZE),
        ("shadow_vmcs12", u8 * KVM_STATE_NESTED_VMX_VMCS_SIZE),
    ]


class _kvm_vmx_nested_state_hdr_smm(CStruct):
    _fields_ = [
        ("flags", u16),
    ]


class kvm_vmx_nested_state_hdr(CStruct):
    """Nested VMX state: the header part."""

    header = "asm/kvm.h"
    _fields_ = [
        ("vmxon_pa", u64),
        ("vmcs12_pa", u64),
        ("smm", _kvm_vmx_nested_state_hdr_smm),
        ("pad", u16),
        ("flags", u32),
        ("preemption_timer_deadline", u64),
    ]


class kvm_svm_nested_state_data(CStruct):
    """Nested SVM state: control area of vmcb12, save area of L1."""

    header = "asm/kvm.h"
    _fields_ = [
        ("vmcb12", u8 * KVM_STATE_NESTED_SVM_VMCB_SIZE),
    ]


class kvm_svm_nested_state_hdr(CStruct):
    """Nested SVM state: the header part."""

    header = "asm/kvm.h"
    _fields_ = [
        ("vmcb_pa", u64),
        ("gpat", u64),
    ]


class _kvm_nested_state_hdr(CUnion):
    _fields_ = [
        ("vmx", kvm_vmx_nested_state_hdr),
        ("svm", kvm_svm_nested_state_hdr),
        ("pad", u8 * 120),
    ]


class kvm_nested_state(CStruct):
    """Nested state of one vCPU; ``data`` is there in guest mode only."""

    header = "asm/kvm.h"
    _fields_ = [
        ("flags", u16),
        ("format", u16),
        ("size", u32),
        ("hdr", _kvm_nested_state_hdr),
    ]
    data = FlexInts(u8, size="size")


class kvm_pmu_event_filter(CStruct):
    """Which PMU events the guest may program."""

    header = "asm/kvm.h"
    _fields_ = [
        ("action", u32),
        ("nevents", u32),
        ("fixed_counter_bitmap", u32),
        ("flags", u32),
        ("pad", u32 * 4),
    ]
    events = FlexInts(u64, count="nevents")


class kvm_x86_mce(CStruct):
    """A machine check to inject."""

    header = "asm/kvm.h"
    _fields_ = [
        ("status", u64),
        ("addr", u64),
        ("misc", u64),
        ("mcg_status", u64),
        ("bank", u8),
        ("pad1", u8 * 7),
        ("pad2", u64 * 3),
    ]


class kvm_hyperv_eventfd(CStruct):
    """An eventfd for a Hyper-V connection id."""

    header = "asm/kvm.h"
    _fields_ = [
        ("conn_id", u32),
        ("fd", s32),
        ("flags", u32),
        ("padding", u32 * 3),
    ]
