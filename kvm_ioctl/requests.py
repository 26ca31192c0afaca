"""Every KVM request of x86, one line each, in the class for the fd it belongs to, in number order.

Numbers and payloads are those of linux/kvm.h; which fd takes a request is from the kernel's
``kvm_dev_ioctl``, ``kvm_vm_ioctl``, ``kvm_vcpu_ioctl``, ``kvm_device_ioctl`` and their
``kvm_arch_*`` counterparts. Fds for statistics and guest_memfd take no KVM request.
"""

from __future__ import annotations

from ctypes import c_ulong

from kvm_ioctl.asm_kvm import (
    kvm_cpuid,
    kvm_cpuid2,
    kvm_debugregs,
    kvm_fpu,
    kvm_hyperv_eventfd,
    kvm_lapic_state,
    kvm_msr_filter,
    kvm_msr_list,
    kvm_msrs,
    kvm_nested_state,
    kvm_pit_state,
    kvm_pit_state2,
    kvm_pmu_event_filter,
    kvm_regs,
    kvm_reinject_control,
    kvm_sregs,
    kvm_sregs2,
    kvm_vcpu_events,
    kvm_x86_mce,
    kvm_xcrs,
    kvm_xsave,
)
from kvm_ioctl.asm_kvm_coco import kvm_sev_cmd, kvm_tdx_cmd
from kvm_ioctl.asm_kvm_xen import kvm_xen_hvm_attr, kvm_xen_hvm_config, kvm_xen_vcpu_attr
from kvm_ioctl.capabilities import Cap
from kvm_ioctl.cstruct import u64
from kvm_ioctl.linux_kvm import (
    kvm_clear_dirty_log,
    kvm_clock_data,
    kvm_coalesced_mmio_zone,
    kvm_create_device,
    kvm_create_guest_memfd,
    kvm_device_attr,
    kvm_dirty_log,
    kvm_enable_cap,
    kvm_enc_region,
    kvm_guest_debug,
    kvm_interrupt,
    kvm_ioeventfd,
    kvm_irq_level,
    kvm_irq_routing,
    kvm_irq_routing_xen_evtchn,
    kvm_irqchip,
    kvm_irqfd,
    kvm_memory_attributes,
    kvm_mp_state,
    kvm_msi,
    kvm_one_reg,
    kvm_pit_config,
    kvm_pre_fault_memory,
    kvm_reg_list,
    kvm_signal_mask,
    kvm_tpr_access_ctl,
    kvm_translation,
    kvm_userspace_memory_region,
    kvm_userspace_memory_region2,
    kvm_vapic_addr,
)
from kvm_ioctl.request import IO, IOR, IOW, IOWR, DeviceFd, Ioctl, SystemFd, VcpuFd, VmFd

# One request is one line, however long, so that a column reads like the kernel's own table.
# fmt: off
# ruff: noqa: E501


class SystemRequests:
    """Requests on /dev/kvm, in number order."""

    KVM_GET_API_VERSION = IO(SystemFd, 0x00)
    KVM_CREATE_VM = IO(SystemFd, 0x01, int)
    KVM_GET_MSR_INDEX_LIST = IOWR(SystemFd, 0x02, kvm_msr_list)
    KVM_CHECK_EXTENSION = IO(SystemFd, 0x03, int)
    KVM_GET_VCPU_MMAP_SIZE = IO(SystemFd, 0x04)
    KVM_GET_SUPPORTED_CPUID = IOWR(SystemFd, 0x05, kvm_cpuid2, cap=Cap.KVM_CAP_EXT_CPUID)
    KVM_GET_EMULATED_CPUID = IOWR(SystemFd, 0x09, kvm_cpuid2, cap=Cap.KVM_CAP_EXT_EMUL_CPUID)
    KVM_GET_MSR_FEATURE_INDEX_LIST = IOWR(SystemFd, 0x0A, kvm_msr_list, cap=Cap.KVM_CAP_GET_MSR_FEATURES)
    KVM_GET_MSRS = IOWR(SystemFd, 0x88, kvm_msrs, cap=Cap.KVM_CAP_GET_MSR_FEATURES)
    KVM_X86_GET_MCE_CAP_SUPPORTED = IOR(SystemFd, 0x9D, u64, cap=Cap.KVM_CAP_MCE)
    KVM_GET_SUPPORTED_HV_CPUID = IOWR(SystemFd, 0xC1, kvm_cpuid2, cap=Cap.KVM_CAP_SYS_HYPERV_CPUID)
    KVM_GET_DEVICE_ATTR = IOW(SystemFd, 0xE2, kvm_device_attr, cap=Cap.KVM_CAP_SYS_ATTRIBUTES)
    KVM_HAS_DEVICE_ATTR = IOW(SystemFd, 0xE3, kvm_device_attr, cap=Cap.KVM_CAP_SYS_ATTRIBUTES)


class VmRequests:
    """Requests on a VM fd, in number order."""

    KVM_CHECK_EXTENSION = IO(VmFd, 0x03, int, cap=Cap.KVM_CAP_CHECK_EXTENSION_VM)
    KVM_CREATE_VCPU = IO(VmFd, 0x41, int)
    KVM_GET_DIRTY_LOG = IOW(VmFd, 0x42, kvm_dirty_log)
    KVM_SET_NR_MMU_PAGES = IO(VmFd, 0x44, int, cap=Cap.KVM_CAP_MMU_SHADOW_CACHE_CONTROL)
    KVM_GET_NR_MMU_PAGES = IO(VmFd, 0x45, cap=Cap.KVM_CAP_MMU_SHADOW_CACHE_CONTROL)
    KVM_SET_USER_MEMORY_REGION = IOW(VmFd, 0x46, kvm_userspace_memory_region, cap=Cap.KVM_CAP_USER_MEMORY)
    KVM_SET_TSS_ADDR = IO(VmFd, 0x47, int, cap=Cap.KVM_CAP_SET_TSS_ADDR)
    KVM_SET_IDENTITY_MAP_ADDR = IOW(VmFd, 0x48, u64, cap=Cap.KVM_CAP_SET_IDENTITY_MAP_ADDR)
    KVM_SET_USER_MEMORY_REGION2 = IOW(VmFd, 0x49, kvm_userspace_memory_region2, cap=Cap.KVM_CAP_USER_MEMORY2)
    KVM_CREATE_IRQCHIP = IO(VmFd, 0x60, cap=Cap.KVM_CAP_IRQCHIP)
    KVM_IRQ_LINE = IOW(VmFd, 0x61, kvm_irq_level, cap=Cap.KVM_CAP_IRQCHIP)
    KVM_GET_IRQCHIP = IOWR(VmFd, 0x62, kvm_irqchip, cap=Cap.KVM_CAP_IRQCHIP)
    KVM_SET_IRQCHIP = IOR(VmFd, 0x63, kvm_irqchip, cap=Cap.KVM_CAP_IRQCHIP)
    KVM_CREATE_PIT = IO(VmFd, 0x64, cap=Cap.KVM_CAP_PIT)
    KVM_GET_PIT = IOWR(VmFd, 0x65, kvm_pit_state, cap=Cap.KVM_CAP_PIT)
    KVM_SET_PIT = IOR(VmFd, 0x66, kvm_pit_state, cap=Cap.KVM_CAP_PIT)
    KVM_IRQ_LINE_STATUS = IOWR(VmFd, 0x67, kvm_irq_level, cap=Cap.KVM_CAP_IRQ_INJECT_STATUS)
    KVM_REGISTER_COALESCED_MMIO = IOW(VmFd, 0x67, kvm_coalesced_mmio_zone, cap=Cap.KVM_CAP_COALESCED_MMIO)
    KVM_UNREGISTER_COALESCED_MMIO = IOW(VmFd, 0x68, kvm_coalesced_mmio_zone, cap=Cap.KVM_CAP_COALESCED_MMIO)
    KVM_SET_GSI_ROUTING = IOW(VmFd, 0x6A, kvm_irq_routing, cap=Cap.KVM_CAP_IRQ_ROUTING)
    KVM_REINJECT_CONTROL = IO(VmFd, 0x71, kvm_reinject_control, cap=Cap.KVM_CAP_REINJECT_CONTROL)
    KVM_IRQFD = IOW(VmFd, 0x76, kvm_irqfd, cap=Cap.KVM_CAP_IRQFD)
    KVM_CREATE_PIT2 = IOW(VmFd, 0x77, kvm_pit_config, cap=Cap.KVM_CAP_PIT2)
    KVM_SET_BOOT_CPU_ID = IO(VmFd, 0x78, int, cap=Cap.KVM_CAP_SET_BOOT_CPU_ID)
    KVM_IOEVENTFD = IOW(VmFd, 0x79, kvm_ioeventfd, cap=Cap.KVM_CAP_IOEVENTFD)
    KVM_XEN_HVM_CONFIG = IOW(VmFd, 0x7A, kvm_xen_hvm_config, cap=Cap.KVM_CAP_XEN_HVM)
    KVM_SET_CLOCK = IOW(VmFd, 0x7B, kvm_clock_data, cap=Cap.KVM_CAP_ADJUST_CLOCK)
    KVM_GET_CLOCK = IOR(VmFd, 0x7C, kvm_clock_data, cap=Cap.KVM_CAP_ADJUST_CLOCK)
    KVM_GET_PIT2 = IOR(VmFd, 0x9F, kvm_pit_state2, cap=Cap.KVM_CAP_PIT_STATE2)
    KVM_SET_PIT2 = IOW(VmFd, 0xA0, kvm_pit_state2, cap=Cap.KVM_CAP_PIT_STATE2)
    KVM_SET_TSC_KHZ = IO(VmFd, 0xA2, int, cap=Cap.KVM_CAP_VM_TSC_CONTROL)
    KVM_GET_TSC_KHZ = IO(VmFd, 0xA3, cap=Cap.KVM_CAP_VM_TSC_CONTROL)
    KVM_ENABLE_CAP = IOW(VmFd, 0xA3, kvm_enable_cap, cap=Cap.KVM_CAP_ENABLE_CAP_VM)
    KVM_SIGNAL_MSI = IOW(VmFd, 0xA5, kvm_msi, cap=Cap.KVM_CAP_SIGNAL_MSI)
    KVM_SET_PMU_EVENT_FILTER = IOW(VmFd, 0xB2, kvm_pmu_event_filter, cap=Cap.KVM_CAP_PMU_EVENT_FILTER)
    # The number encodes an unsigned long; the kernel takes the address of a command.
    KVM_MEMORY_ENCRYPT_OP: Ioctl[VmFd, kvm_sev_cmd | kvm_tdx_cmd] = IOWR(VmFd, 0xBA, kvm_sev_cmd, encodes=c_ulong)
    KVM_MEMORY_ENCRYPT_REG_REGION = IOR(VmFd, 0xBB, kvm_enc_region)
    KVM_MEMORY_ENCRYPT_UNREG_REGION = IOR(VmFd, 0xBC, kvm_enc_region)
    KVM_HYPERV_EVENTFD = IOW(VmFd, 0xBD, kvm_hyperv_eventfd, cap=Cap.KVM_CAP_HYPERV_EVENTFD)
    KVM_CLEAR_DIRTY_LOG = IOWR(VmFd, 0xC0, kvm_clear_dirty_log, cap=Cap.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)
    KVM_X86_SET_MSR_FILTER = IOW(VmFd, 0xC6, kvm_msr_filter, cap=Cap.KVM_CAP_X86_MSR_FILTER)
    KVM_RESET_DIRTY_RINGS = IO(VmFd, 0xC7, cap=Cap.KVM_CAP_DIRTY_LOG_RING)
    KVM_XEN_HVM_GET_ATTR = IOWR(VmFd, 0xC8, kvm_xen_hvm_attr, cap=Cap.KVM_CAP_XEN_HVM)
    KVM_XEN_HVM_SET_ATTR = IOW(VmFd, 0xC9, kvm_xen_hvm_attr, cap=Cap.KVM_CAP_XEN_HVM)
    KVM_GET_STATS_FD = IO(VmFd, 0xCE, cap=Cap.KVM_CAP_BINARY_STATS_FD)
    KVM_XEN_HVM_EVTCHN_SEND = IOW(VmFd, 0xD0, kvm_irq_routing_xen_evtchn, cap=Cap.KVM_CAP_XEN_HVM)
    KVM_SET_MEMORY_ATTRIBUTES = IOW(VmFd, 0xD2, kvm_memory_attributes, cap=Cap.KVM_CAP_MEMORY_ATTRIBUTES)
    KVM_CREATE_GUEST_MEMFD = IOWR(VmFd, 0xD4, kvm_create_guest_memfd, cap=Cap.KVM_CAP_GUEST_MEMFD)
    KVM_CREATE_DEVICE = IOWR(VmFd, 0xE0, kvm_create_device, cap=Cap.KVM_CAP_DEVICE_CTRL)
    KVM_SET_DEVICE_ATTR = IOW(VmFd, 0xE1, kvm_device_attr, cap=Cap.KVM_CAP_VM_ATTRIBUTES)
    KVM_GET_DEVICE_ATTR = IOW(VmFd, 0xE2, kvm_device_attr, cap=Cap.KVM_CAP_VM_ATTRIBUTES)
    KVM_HAS_DEVICE_ATTR = IOW(VmFd, 0xE3, kvm_device_attr, cap=Cap.KVM_CAP_VM_ATTRIBUTES)


class VcpuRequests:
    """Requests on a vCPU fd, in number order."""

    KVM_RUN = IO(VcpuFd, 0x80)
    KVM_GET_REGS = IOR(VcpuFd, 0x81, kvm_regs)
    KVM_SET_REGS = IOW(VcpuFd, 0x82, kvm_regs)
    KVM_GET_SREGS = IOR(VcpuFd, 0x83, kvm_sregs)
    KVM_SET_SREGS = IOW(VcpuFd, 0x84, kvm_sregs)
    KVM_TRANSLATE = IOWR(VcpuFd, 0x85, kvm_translation)
    KVM_INTERRUPT = IOW(VcpuFd, 0x86, kvm_interrupt)
    KVM_GET_MSRS = IOWR(VcpuFd, 0x88, kvm_msrs)
    KVM_SET_MSRS = IOW(VcpuFd, 0x89, kvm_msrs)
    KVM_SET_CPUID = IOW(VcpuFd, 0x8A, kvm_cpuid)
    KVM_SET_SIGNAL_MASK = IOW(VcpuFd, 0x8B, kvm_signal_mask)
    KVM_GET_FPU = IOR(VcpuFd, 0x8C, kvm_fpu)
    KVM_SET_FPU = IOW(VcpuFd, 0x8D, kvm_fpu)
    KVM_GET_LAPIC = IOR(VcpuFd, 0x8E, kvm_lapic_state, cap=Cap.KVM_CAP_IRQCHIP)
    KVM_SET_LAPIC = IOW(VcpuFd, 0x8F, kvm_lapic_state, cap=Cap.KVM_CAP_IRQCHIP)
    KVM_SET_CPUID2 = IOW(VcpuFd, 0x90, kvm_cpuid2, cap=Cap.KVM_CAP_EXT_CPUID)
    KVM_GET_CPUID2 = IOWR(VcpuFd, 0x91, kvm_cpuid2, cap=Cap.KVM_CAP_EXT_CPUID)
    KVM_TPR_ACCESS_REPORTING = IOWR(VcpuFd, 0x92, kvm_tpr_access_ctl, cap=Cap.KVM_CAP_VAPIC)
    KVM_SET_VAPIC_ADDR = IOW(VcpuFd, 0x93, kvm_vapic_addr, cap=Cap.KVM_CAP_VAPIC)
    KVM_GET_MP_STATE = IOR(VcpuFd, 0x98, kvm_mp_state, cap=Cap.KVM_CAP_MP_STATE)
    KVM_SET_MP_STATE = IOW(VcpuFd, 0x99, kvm_mp_state, cap=Cap.KVM_CAP_MP_STATE)
    KVM_NMI = IO(VcpuFd, 0x9A, cap=Cap.KVM_CAP_USER_NMI)
    KVM_SET_GUEST_DEBUG = IOW(VcpuFd, 0x9B, kvm_guest_debug, cap=Cap.KVM_CAP_SET_GUEST_DEBUG)
    KVM_X86_SETUP_MCE = IOW(VcpuFd, 0x9C, u64, cap=Cap.KVM_CAP_MCE)
    KVM_X86_SET_MCE = IOW(VcpuFd, 0x9E, kvm_x86_mce, cap=Cap.KVM_CAP_MCE)
    KVM_GET_VCPU_EVENTS = IOR(VcpuFd, 0x9F, kvm_vcpu_events, cap=Cap.KVM_CAP_VCPU_EVENTS)
    KVM_SET_VCPU_EVENTS = IOW(VcpuFd, 0xA0, kvm_vcpu_events, cap=Cap.KVM_CAP_VCPU_EVENTS)
    KVM_GET_DEBUGREGS = IOR(VcpuFd, 0xA1, kvm_debugregs, cap=Cap.KVM_CAP_DEBUGREGS)
    KVM_SET_DEBUGREGS = IOW(VcpuFd, 0xA2, kvm_debugregs, cap=Cap.KVM_CAP_DEBUGREGS)
    KVM_SET_TSC_KHZ = IO(VcpuFd, 0xA2, int, cap=Cap.KVM_CAP_TSC_CONTROL)
    KVM_GET_TSC_KHZ = IO(VcpuFd, 0xA3, cap=Cap.KVM_CAP_GET_TSC_KHZ)
    KVM_ENABLE_CAP = IOW(VcpuFd, 0xA3, kvm_enable_cap, cap=Cap.KVM_CAP_ENABLE_CAP)
    KVM_GET_XSAVE = IOR(VcpuFd, 0xA4, kvm_xsave, cap=Cap.KVM_CAP_XSAVE)
    KVM_SET_XSAVE = IOW(VcpuFd, 0xA5, kvm_xsave, cap=Cap.KVM_CAP_XSAVE)
    KVM_GET_XCRS = IOR(VcpuFd, 0xA6, kvm_xcrs, cap=Cap.KVM_CAP_XCRS)
    KVM_SET_XCRS = IOW(VcpuFd, 0xA7, kvm_xcrs, cap=Cap.KVM_CAP_XCRS)
    KVM_GET_ONE_REG = IOW(VcpuFd, 0xAB, kvm_one_reg, cap=Cap.KVM_CAP_ONE_REG)
    KVM_SET_ONE_REG = IOW(VcpuFd, 0xAC, kvm_one_reg, cap=Cap.KVM_CAP_ONE_REG)
    KVM_KVMCLOCK_CTRL = IO(VcpuFd, 0xAD, cap=Cap.KVM_CAP_KVMCLOCK_CTRL)
    KVM_GET_REG_LIST = IOWR(VcpuFd, 0xB0, kvm_reg_list, cap=Cap.KVM_CAP_ONE_REG)
    KVM_SMI = IO(VcpuFd, 0xB7, cap=Cap.KVM_CAP_X86_SMM)
    KVM_MEMORY_ENCRYPT_OP = IOWR(VcpuFd, 0xBA, kvm_tdx_cmd, encodes=c_ulong)
    KVM_GET_NESTED_STATE = IOWR(VcpuFd, 0xBE, kvm_nested_state, cap=Cap.KVM_CAP_NESTED_STATE)
    KVM_SET_NESTED_STATE = IOW(VcpuFd, 0xBF, kvm_nested_state, cap=Cap.KVM_CAP_NESTED_STATE)
    KVM_GET_SUPPORTED_HV_CPUID = IOWR(VcpuFd, 0xC1, kvm_cpuid2, cap=Cap.KVM_CAP_HYPERV_CPUID)
    KVM_XEN_VCPU_GET_ATTR = IOWR(VcpuFd, 0xCA, kvm_xen_vcpu_attr, cap=Cap.KVM_CAP_XEN_HVM)
    KVM_XEN_VCPU_SET_ATTR = IOW(VcpuFd, 0xCB, kvm_xen_vcpu_attr, cap=Cap.KVM_CAP_XEN_HVM)
    KVM_GET_SREGS2 = IOR(VcpuFd, 0xCC, kvm_sregs2, cap=Cap.KVM_CAP_SREGS2)
    KVM_SET_SREGS2 = IOW(VcpuFd, 0xCD, kvm_sregs2, cap=Cap.KVM_CAP_SREGS2)
    KVM_GET_STATS_FD = IO(VcpuFd, 0xCE, cap=Cap.KVM_CAP_BINARY_STATS_FD)
    KVM_GET_XSAVE2 = IOR(VcpuFd, 0xCF, kvm_xsave, cap=Cap.KVM_CAP_XSAVE2)
    KVM_PRE_FAULT_MEMORY = IOWR(VcpuFd, 0xD5, kvm_pre_fault_memory, cap=Cap.KVM_CAP_PRE_FAULT_MEMORY)
    KVM_SET_DEVICE_ATTR = IOW(VcpuFd, 0xE1, kvm_device_attr, cap=Cap.KVM_CAP_VCPU_ATTRIBUTES)
    KVM_GET_DEVICE_ATTR = IOW(VcpuFd, 0xE2, kvm_device_attr, cap=Cap.KVM_CAP_VCPU_ATTRIBUTES)
    KVM_HAS_DEVICE_ATTR = IOW(VcpuFd, 0xE3, kvm_device_attr, cap=Cap.KVM_CAP_VCPU_ATTRIBUTES)


class DeviceRequests:
    """Requests on the fd of an in-kernel device, in number order."""

    KVM_SET_DEVICE_ATTR = IOW(DeviceFd, 0xE1, kvm_device_attr, cap=Cap.KVM_CAP_DEVICE_CTRL)
    KVM_GET_DEVICE_ATTR = IOW(DeviceFd, 0xE2, kvm_device_attr, cap=Cap.KVM_CAP_DEVICE_CTRL)
    KVM_HAS_DEVICE_ATTR = IOW(DeviceFd, 0xE3, kvm_device_attr, cap=Cap.KVM_CAP_DEVICE_CTRL)
