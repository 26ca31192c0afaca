"""Structs and constants of linux/kvm.h, but for ``kvm_run``, capabilities and exits."""

from __future__ import annotations

from enum import IntEnum, IntFlag

from kvm_ioctl.asm_kvm import kvm_guest_debug_arch, kvm_ioapic_state, kvm_pic_state
from kvm_ioctl.cstruct import (
    CStruct,
    CUnion,
    FlexArray,
    FlexInts,
    s16,
    s32,
    u8,
    u16,
    u32,
    u64,
    void_p,
)

KVM_API_VERSION = 12
KVM_PIT_SPEAKER_DUMMY = 1
SYNC_REGS_SIZE_BYTES = 0x800
KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL = 0xFFFFFFFF
KVM_REG_ARCH_MASK = 0xFF00000000000000
KVM_REG_X86 = 0x2000000000000000
KVM_REG_SIZE_SHIFT = 52
KVM_REG_SIZE_MASK = 0xF0000000000000
KVM_REG_SIZE_U8 = 0
KVM_REG_SIZE_U16 = 0x10000000000000
KVM_REG_SIZE_U32 = 0x20000000000000
KVM_REG_SIZE_U64 = 0x30000000000000
KVM_REG_SIZE_U128 = 0x40000000000000
KVM_REG_SIZE_U256 = 0x50000000000000
KVM_REG_SIZE_U512 = 0x60000000000000
KVM_REG_SIZE_U1024 = 0x70000000000000
KVM_REG_SIZE_U2048 = 0x80000000000000
KVM_CREATE_DEVICE_TEST = 1
KVM_STATS_TYPE_MASK = 15
KVM_STATS_UNIT_MASK = 0xF0
KVM_STATS_BASE_MASK = 0xF00


class MemFlags(IntFlag):
    """``kvm_userspace_memory_region.flags``."""

    KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
    KVM_MEM_READONLY = 1 << 1
    KVM_MEM_GUEST_MEMFD = 1 << 2


class MpState(IntEnum):
    """``kvm_mp_state.mp_state``."""

    KVM_MP_STATE_RUNNABLE = 0
    KVM_MP_STATE_UNINITIALIZED = 1
    KVM_MP_STATE_INIT_RECEIVED = 2
    KVM_MP_STATE_HALTED = 3
    KVM_MP_STATE_SIPI_RECEIVED = 4
    KVM_MP_STATE_STOPPED = 5
    KVM_MP_STATE_CHECK_STOP = 6
    KVM_MP_STATE_OPERATING = 7
    KVM_MP_STATE_LOAD = 8
    KVM_MP_STATE_AP_RESET_HOLD = 9
    KVM_MP_STATE_SUSPENDED = 10


class GuestDebug(IntFlag):
    """``kvm_guest_debug.control``."""

    KVM_GUESTDBG_ENABLE = 1 << 0
    KVM_GUESTDBG_SINGLESTEP = 1 << 1
    KVM_GUESTDBG_USE_SW_BP = 1 << 16
    KVM_GUESTDBG_USE_HW_BP = 1 << 17
    KVM_GUESTDBG_INJECT_DB = 1 << 18
    KVM_GUESTDBG_INJECT_BP = 1 << 19
    KVM_GUESTDBG_BLOCKIRQ = 1 << 20


class IoeventfdFlags(IntFlag):
    """``kvm_ioeventfd.flags``."""

    KVM_IOEVENTFD_FLAG_DATAMATCH = 1 << 0
    KVM_IOEVENTFD_FLAG_PIO = 1 << 1
    KVM_IOEVENTFD_FLAG_DEASSIGN = 1 << 2
    KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY = 1 << 3


class DisableExits(IntFlag):
    """Argument of KVM_CAP_X86_DISABLE_EXITS."""

    KVM_X86_DISABLE_EXITS_MWAIT = 1 << 0
    KVM_X86_DISABLE_EXITS_HLT = 1 << 1
    KVM_X86_DISABLE_EXITS_PAUSE = 1 << 2
    KVM_X86_DISABLE_EXITS_CSTATE = 1 << 3
    KVM_X86_DISABLE_EXITS_APERFMPERF = 1 << 4


class IrqRoutingType(IntEnum):
    """``kvm_irq_routing_entry.type``."""

    KVM_IRQ_ROUTING_IRQCHIP = 1
    KVM_IRQ_ROUTING_MSI = 2
    KVM_IRQ_ROUTING_HV_SINT = 4
    KVM_IRQ_ROUTING_XEN_EVTCHN = 5


class IrqfdFlags(IntFlag):
    """``kvm_irqfd.flags``."""

    KVM_IRQFD_FLAG_DEASSIGN = 1 << 0
    KVM_IRQFD_FLAG_RESAMPLE = 1 << 1


class ClockFlags(IntFlag):
    """``kvm_clock_data.flags`` and the value of KVM_CAP_ADJUST_CLOCK."""

    KVM_CLOCK_TSC_STABLE = 1 << 1
    KVM_CLOCK_REALTIME = 1 << 2
    KVM_CLOCK_HOST_TSC = 1 << 3


class MsiFlags(IntFlag):
    """``kvm_msi.flags``."""

    KVM_MSI_VALID_DEVID = 1 << 0


class DeviceType(IntEnum):
    """``kvm_create_device.type``."""

    KVM_DEV_TYPE_FSL_MPIC_20 = 1
    KVM_DEV_TYPE_FSL_MPIC_42 = 2
    KVM_DEV_TYPE_XICS = 3
    KVM_DEV_TYPE_VFIO = 4
    KVM_DEV_TYPE_ARM_VGIC_V2 = 5
    KVM_DEV_TYPE_FLIC = 6
    KVM_DEV_TYPE_ARM_VGIC_V3 = 7
    KVM_DEV_TYPE_ARM_VGIC_ITS = 8
    KVM_DEV_TYPE_XIVE = 9
    KVM_DEV_TYPE_ARM_PV_TIME = 10
    KVM_DEV_TYPE_RISCV_AIA = 11
    KVM_DEV_TYPE_LOONGARCH_IPI = 12
    KVM_DEV_TYPE_LOONGARCH_EIOINTC = 13
    KVM_DEV_TYPE_LOONGARCH_PCHPIC = 14
    KVM_DEV_TYPE_LOONGARCH_DMSINTC = 15
    KVM_DEV_TYPE_ARM_VGIC_V5 = 16


class VfioGroup(IntEnum):
    """``kvm_device_attr.group`` of the VFIO device."""

    KVM_DEV_VFIO_FILE = 1


class VfioFileAttr(IntEnum):
    """``kvm_device_attr.attr`` in group KVM_DEV_VFIO_FILE."""

    KVM_DEV_VFIO_FILE_ADD = 1
    KVM_DEV_VFIO_FILE_DEL = 2


class DirtyLogProtect(IntFlag):
    """Argument of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2."""

    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE = 1 << 0
    KVM_DIRTY_LOG_INITIALLY_SET = 1 << 1


class DirtyGfnFlags(IntFlag):
    """``kvm_dirty_gfn.flags``: dirtied, then harvested (to be reset)."""

    KVM_DIRTY_GFN_F_DIRTY = 1 << 0
    KVM_DIRTY_GFN_F_RESET = 1 << 1


class BusLockDetection(IntFlag):
    """Argument of KVM_CAP_X86_BUS_LOCK_EXIT."""

    KVM_BUS_LOCK_DETECTION_OFF = 1 << 0
    KVM_BUS_LOCK_DETECTION_EXIT = 1 << 1


class PmuCapability(IntFlag):
    """Argument of KVM_CAP_PMU_CAPABILITY."""

    KVM_PMU_CAP_DISABLE = 1 << 0


class StatsType(IntEnum):
    """What a statistic is (``kvm_stats_desc.flags``, KVM_STATS_TYPE_MASK)."""

    KVM_STATS_TYPE_CUMULATIVE = 0
    KVM_STATS_TYPE_INSTANT = 1
    KVM_STATS_TYPE_PEAK = 2
    KVM_STATS_TYPE_LINEAR_HIST = 3
    KVM_STATS_TYPE_LOG_HIST = 4


class StatsUnit(IntEnum):
    """What a statistic counts (``kvm_stats_desc.flags``, KVM_STATS_UNIT_MASK)."""

    KVM_STATS_UNIT_NONE = 0
    KVM_STATS_UNIT_BYTES = 16
    KVM_STATS_UNIT_SECONDS = 32
    KVM_STATS_UNIT_CYCLES = 48
    KVM_STATS_UNIT_BOOLEAN = 64


class StatsBase(IntEnum):
    """Base of the exponent (``kvm_stats_desc.flags``, KVM_STATS_BASE_MASK)."""

    KVM_STATS_BASE_POW10 = 0
    KVM_STATS_BASE_POW2 = 256


class NotifyVmexit(IntFlag):
    """Argument (low half) of KVM_CAP_X86_NOTIFY_VMEXIT."""

    KVM_X86_NOTIFY_VMEXIT_ENABLED = 1 << 0
    KVM_X86_NOTIFY_VMEXIT_USER = 1 << 1


class MemoryAttributes(IntFlag):
    """``kvm_memory_attributes.attributes``."""

    KVM_MEMORY_ATTRIBUTE_PRIVATE = 1 << 3


class GuestMemfdFlags(IntFlag):
    """``kvm_create_guest_memfd.flags``."""

    GUEST_MEMFD_FLAG_MMAP = 1 << 0
    GUEST_MEMFD_FLAG_INIT_SHARED = 1 << 1


class kvm_userspace_memory_region(CStruct):
    """A memory slot; the upper half of ``slot`` is the address space."""

    header = "linux/kvm.h"
    _fields_ = [
        ("slot", u32),
        ("flags", u32),
        ("guest_phys_addr", u64),
        ("memory_size", u64),
        ("userspace_addr", u64),
    ]


class kvm_userspace_memory_region2(CStruct):
    """A memory slot that may have guest_memfd behind it."""

    header = "linux/kvm.h"
    _fields_ = [
        ("slot", u32),
        ("flags", u32),
        ("guest_phys_addr", u64),
        ("memory_size", u64),
        ("userspace_addr", u64),
        ("guest_memfd_offset", u64),
        ("guest_memfd", u32),
        ("pad1", u32),
        ("pad2", u64 * 14),
    ]


class _kvm_irq_level_u(CUnion):
    _fields_ = [
        ("irq", u32),
        ("status", s32),
    ]


class kvm_irq_level(CStruct):
    """An interrupt line and its level."""

    header = "linux/kvm.h"
    _anonymous_ = ("_u",)
    _fields_ = [
        ("_u", _kvm_irq_level_u),
        ("level", u32),
    ]


class _kvm_irqchip_chip(CUnion):
    _fields_ = [
        ("dummy", u8 * 512),
        ("pic", kvm_pic_state),
        ("ioapic", kvm_ioapic_state),
    ]


class kvm_irqchip(CStruct):
    """An interrupt controller of the in-kernel irqchip."""

    header = "linux/kvm.h"
    _fields_ = [
        ("chip_id", u32),
        ("pad", u32),
        ("chip", _kvm_irqchip_chip),
    ]


class kvm_pit_config(CStruct):
    """How to make the 8254 timer."""

    header = "linux/kvm.h"
    _fields_ = [
        ("flags", u32),
        ("pad", u32 * 15),
    ]


class _kvm_coalesced_mmio_zone_u(CUnion):
    _fields_ = [
        ("pad", u32),
        ("pio", u32),
    ]


class kvm_coalesced_mmio_zone(CStruct):
    """A range whose writes are collected in the coalesced ring."""

    header = "linux/kvm.h"
    _anonymous_ = ("_u",)
    _fields_ = [
        ("addr", u64),
        ("size", u32),
        ("_u", _kvm_coalesced_mmio_zone_u),
    ]


class _kvm_coalesced_mmio_u(CUnion):
    _fields_ = [
        ("pad", u32),
        ("pio", u32),
    ]


class kvm_coalesced_mmio(CStruct):
    """One write in the coalesced ring."""

    header = "linux/kvm.h"
    _anonymous_ = ("_u",)
    _fields_ = [
        ("phys_addr", u64),
        ("len", u32),
        ("_u", _kvm_coalesced_mmio_u),
        ("data", u8 * 8),
    ]


class kvm_coalesced_mmio_ring(CStruct):
    """The coalesced ring of a VM; it fills the page it is in."""

    header = "linux/kvm.h"
    _fields_ = [
        ("first", u32),
        ("last", u32),
    ]
    coalesced_mmio = FlexArray(kvm_coalesced_mmio)


class kvm_translation(CStruct):
    """A guest-virtual address and what it maps to."""

    header = "linux/kvm.h"
    _fields_ = [
        ("linear_address", u64),
        ("physical_address", u64),
        ("valid", u8),
        ("writeable", u8),
        ("usermode", u8),
        ("pad", u8 * 5),
    ]


class kvm_interrupt(CStruct):
    """An interrupt vector to inject."""

    header = "linux/kvm.h"
    _fields_ = [
        ("irq", u32),
    ]


class _kvm_dirty_log_u(CUnion):
    _fields_ = [
        ("dirty_bitmap", void_p),
        ("padding2", u64),
    ]


class kvm_dirty_log(CStruct):
    """Where to put the dirty bitmap of a slot."""

    header = "linux/kvm.h"
    _anonymous_ = ("_u",)
    _fields_ = [
        ("slot", u32),
        ("padding1", u32),
        ("_u", _kvm_dirty_log_u),
    ]


class _kvm_clear_dirty_log_u(CUnion):
    _fields_ = [
        ("dirty_bitmap", void_p),
        ("padding2", u64),
    ]


class kvm_clear_dirty_log(CStruct):
    """Pages of a slot to write-protect again."""

    header = "linux/kvm.h"
    _anonymous_ = ("_u",)
    _fields_ = [
        ("slot", u32),
        ("num_pages", u32),
        ("first_page", u64),
        ("_u", _kvm_clear_dirty_log_u),
    ]


class kvm_signal_mask(CStruct):
    """Signals blocked inside KVM_RUN."""

    header = "linux/kvm.h"
    _fields_ = [
        ("len", u32),
    ]
    sigset = FlexInts(u8, count="len")


class kvm_tpr_access_ctl(CStruct):
    """Whether TPR accesses exit."""

    header = "linux/kvm.h"
    _fields_ = [
        ("enabled", u32),
        ("flags", u32),
        ("reserved", u32 * 8),
    ]


class kvm_vapic_addr(CStruct):
    """Where the guest keeps its virtual APIC."""

    header = "linux/kvm.h"
    _fields_ = [
        ("vapic_addr", u64),
    ]


class kvm_mp_state(CStruct):
    """Whether a vCPU runs, halts or waits."""

    header = "linux/kvm.h"
    _fields_ = [
        ("mp_state", u32),
    ]


class kvm_guest_debug(CStruct):
    """Breakpoints and single steps."""

    header = "linux/kvm.h"
    _fields_ = [
        ("control", u32),
        ("pad", u32),
        ("arch", kvm_guest_debug_arch),
    ]


class kvm_ioeventfd(CStruct):
    """An eventfd that a guest write signals."""

    header = "linux/kvm.h"
    _fields_ = [
        ("datamatch", u64),
        ("addr", u64),
        ("len", u32),
        ("fd", s32),
        ("flags", u32),
        ("pad", u8 * 36),
    ]


class kvm_enable_cap(CStruct):
    """A capability to enable and its arguments."""

    header = "linux/kvm.h"
    _fields_ = [
        ("cap", u32),
        ("flags", u32),
        ("args", u64 * 4),
        ("pad", u8 * 64),
    ]


class kvm_irq_routing_irqchip(CStruct):
    """A pin of an in-kernel interrupt controller."""

    header = "linux/kvm.h"
    _fields_ = [
        ("irqchip", u32),
        ("pin", u32),
    ]


class _kvm_irq_routing_msi_u(CUnion):
    _fields_ = [
        ("pad", u32),
        ("devid", u32),
    ]


class kvm_irq_routing_msi(CStruct):
    """A message-signalled interrupt."""

    header = "linux/kvm.h"
    _anonymous_ = ("_u",)
    _fields_ = [
        ("address_lo", u32),
        ("address_hi", u32),
        ("data", u32),
        ("_u", _kvm_irq_routing_msi_u),
    ]


class kvm_irq_routing_hv_sint(CStruct):
    """A Hyper-V synthetic interrupt."""

    header = "linux/kvm.h"
    _fields_ = [
        ("vcpu", u32),
        ("sint", u32),
    ]


class kvm_irq_routing_xen_evtchn(CStruct):
    """A Xen event channel."""

    header = "linux/kvm.h"
    _fields_ = [
        ("port", u32),
        ("vcpu", u32),
        ("priority", u32),
    ]


class _kvm_irq_routing_entry_u(CUnion):
    _fields_ = [
        ("irqchip", kvm_irq_routing_irqchip),
        ("msi", kvm_irq_routing_msi),
        ("hv_sint", kvm_irq_routing_hv_sint),
        ("xen_evtchn", kvm_irq_routing_xen_evtchn),
        ("pad", u32 * 8),
    ]


class kvm_irq_routing_entry(CStruct):
    """Where a GSI leads."""

    header = "linux/kvm.h"
    _fields_ = [
        ("gsi", u32),
        ("type", u32),
        ("flags", u32),
        ("pad", u32),
        ("u", _kvm_irq_routing_entry_u),
    ]


class kvm_irq_routing(CStruct):
    """The whole GSI routing table."""

    header = "linux/kvm.h"
    _fields_ = [
        ("nr", u32),
        ("flags", u32),
    ]
    entries = FlexArray(kvm_irq_routing_entry, count="nr")


class kvm_irqfd(CStruct):
    """An eventfd that raises a GSI."""

    header = "linux/kvm.h"
    _fields_ = [
        ("fd", u32),
        ("gsi", u32),
        ("flags", u32),
        ("resamplefd", u32),
        ("pad", u8 * 16),
    ]


class kvm_clock_data(CStruct):
    """The kvmclock of a VM."""

    header = "linux/kvm.h"
    _fields_ = [
        ("clock", u64),
        ("flags", u32),
        ("pad0", u32),
        ("realtime", u64),
        ("host_tsc", u64),
        ("pad", u32 * 4),
    ]


class kvm_reg_list(CStruct):
    """Ids for KVM_GET_ONE_REG."""

    header = "linux/kvm.h"
    _fields_ = [
        ("n", u64),
    ]
    reg = FlexInts(u64, count="n")


class kvm_one_reg(CStruct):
    """One register: its id, and where its value is."""

    header = "linux/kvm.h"
    _fields_ = [
        ("id", u64),
        ("addr", u64),
    ]


class kvm_msi(CStruct):
    """A message-signalled interrupt to inject."""

    header = "linux/kvm.h"
    _fields_ = [
        ("address_lo", u32),
        ("address_hi", u32),
        ("data", u32),
        ("flags", u32),
        ("devid", u32),
        ("pad", u8 * 12),
    ]


class kvm_create_device(CStruct):
    """A device to make in the kernel."""

    header = "linux/kvm.h"
    _fields_ = [
        ("type", u32),
        ("fd", u32),
        ("flags", u32),
    ]


class kvm_device_attr(CStruct):
    """An attribute of a device, vCPU, VM or of KVM itself."""

    header = "linux/kvm.h"
    _fields_ = [
        ("flags", u32),
        ("group", u32),
        ("attr", u64),
        ("addr", u64),
    ]


class kvm_enc_region(CStruct):
    """Guest memory to pin for encryption."""

    header = "linux/kvm.h"
    _fields_ = [
        ("addr", u64),
        ("size", u64),
    ]


class kvm_dirty_gfn(CStruct):
    """One entry of a dirty ring."""

    header = "linux/kvm.h"
    _fields_ = [
        ("flags", u32),
        ("slot", u32),
        ("offset", u64),
    ]


class kvm_stats_header(CStruct):
    """How the binary statistics are laid out."""

    header = "linux/kvm.h"
    _fields_ = [
        ("flags", u32),
        ("name_size", u32),
        ("num_desc", u32),
        ("id_offset", u32),
        ("desc_offset", u32),
        ("data_offset", u32),
    ]


class kvm_stats_desc(CStruct):
    """One statistic; ``name`` is as long as the header says."""

    header = "linux/kvm.h"
    _fields_ = [
        ("flags", u32),
        ("exponent", s16),
        ("size", u16),
        ("offset", u32),
        ("bucket_size", u32),
    ]
    name = FlexInts(u8)


class kvm_memory_attributes(CStruct):
    """Attributes for a range of guest memory."""

    header = "linux/kvm.h"
    _fields_ = [
        ("address", u64),
        ("size", u64),
        ("attributes", u64),
        ("flags", u64),
    ]


class kvm_create_guest_memfd(CStruct):
    """A guest_memfd to make."""

    header = "linux/kvm.h"
    _fields_ = [
        ("size", u64),
        ("flags", u64),
        ("reserved", u64 * 6),
    ]


class kvm_pre_fault_memory(CStruct):
    """Guest memory to map before it is used."""

    header = "linux/kvm.h"
    _fields_ = [
        ("gpa", u64),
        ("size", u64),
        ("flags", u64),
        ("padding", u64 * 5),
    ]
