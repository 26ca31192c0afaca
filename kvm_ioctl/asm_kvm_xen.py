"""Structs and constants of asm/kvm.h (x86): Xen guests."""

from __future__ import annotations

from enum import IntEnum, IntFlag

from kvm_ioctl.cstruct import CStruct, CUnion, s32, u8, u16, u32, u64

KVM_XEN_MSR_MIN_INDEX = 0x40000000
KVM_XEN_MSR_MAX_INDEX = 0x4FFFFFFF
KVM_XEN_INVALID_GFN = 0xFFFFFFFFFFFFFFFF
KVM_XEN_INVALID_GPA = 0xFFFFFFFFFFFFFFFF


class XenHvmConfigFlags(IntFlag):
    """``kvm_xen_hvm_config.flags`` and the value of KVM_CAP_XEN_HVM."""

    KVM_XEN_HVM_CONFIG_HYPERCALL_MSR = 1 << 0
    KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL = 1 << 1
    KVM_XEN_HVM_CONFIG_SHARED_INFO = 1 << 2
    KVM_XEN_HVM_CONFIG_RUNSTATE = 1 << 3
    KVM_XEN_HVM_CONFIG_EVTCHN_2LEVEL = 1 << 4
    KVM_XEN_HVM_CONFIG_EVTCHN_SEND = 1 << 5
    KVM_XEN_HVM_CONFIG_RUNSTATE_UPDATE_FLAG = 1 << 6
    KVM_XEN_HVM_CONFIG_PVCLOCK_TSC_UNSTABLE = 1 << 7
    KVM_XEN_HVM_CONFIG_SHARED_INFO_HVA = 1 << 8


class XenEvtchnFlags(IntFlag):
    """``kvm_xen_hvm_attr.u.evtchn.flags``."""

    KVM_XEN_EVTCHN_DEASSIGN = 1 << 0
    KVM_XEN_EVTCHN_UPDATE = 1 << 1
    KVM_XEN_EVTCHN_RESET = 1 << 2


class XenAttrType(IntEnum):
    """``kvm_xen_hvm_attr.type``."""

    KVM_XEN_ATTR_TYPE_LONG_MODE = 0
    KVM_XEN_ATTR_TYPE_SHARED_INFO = 1
    KVM_XEN_ATTR_TYPE_UPCALL_VECTOR = 2
    KVM_XEN_ATTR_TYPE_EVTCHN = 3
    KVM_XEN_ATTR_TYPE_XEN_VERSION = 4
    KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG = 5
    KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA = 6


class XenVcpuAttrType(IntEnum):
    """``kvm_xen_vcpu_attr.type``."""

    KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO = 0
    KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO = 1
    KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR = 2
    KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT = 3
    KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA = 4
    KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST = 5
    KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID = 6
    KVM_XEN_VCPU_ATTR_TYPE_TIMER = 7
    KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR = 8
    KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA = 9


class kvm_xen_hvm_config(CStruct):
    """Xen hypercall pages and features."""

    header = "asm/kvm.h"
    _fields_ = [
        ("flags", u32),
        ("msr", u32),
        ("blob_addr_32", u64),
        ("blob_addr_64", u64),
        ("blob_size_32", u8),
        ("blob_size_64", u8),
        ("pad2", u8 * 30),
    ]


class _kvm_xen_hvm_attr_u_shared_info(CUnion):
    _fields_ = [
        ("gfn", u64),
        ("hva", u64),
    ]


class _kvm_xen_hvm_attr_u_evtchn_deliver_port(CStruct):
    _fields_ = [
        ("port", u32),
        ("vcpu", u32),
        ("priority", u32),
    ]


class _kvm_xen_hvm_attr_u_evtchn_deliver_eventfd(CStruct):
    _fields_ = [
        ("port", u32),
        ("fd", s32),
    ]


class _kvm_xen_hvm_attr_u_evtchn_deliver(CUnion):
    _fields_ = [
        ("port", _kvm_xen_hvm_attr_u_evtchn_deliver_port),
        ("eventfd", _kvm_xen_hvm_attr_u_evtchn_deliver_eventfd),
        ("padding", u32 * 4),
    ]


class _kvm_xen_hvm_attr_u_evtchn(CStruct):
    _fields_ = [
        ("send_port", u32),
        ("type", u32),
        ("flags", u32),
        ("deliver", _kvm_xen_hvm_attr_u_evtchn_deliver),
    ]


class _kvm_xen_hvm_attr_u(CUnion):
    _fields_ = [
        ("long_mode", u8),
        ("vector", u8),
        ("runstate_update_flag", u8),
        ("shared_info", _kvm_xen_hvm_attr_u_shared_info),
        ("evtchn", _kvm_xen_hvm_attr_u_evtchn),
        ("xen_version", u32),
        ("pad", u64 * 8),
    ]


class kvm_xen_hvm_attr(CStruct):
    """A Xen attribute of a VM."""

    header = "asm/kvm.h"
    _fields_ = [
        ("type", u16),
        ("pad", u16 * 3),
        ("u", _kvm_xen_hvm_attr_u),
    ]


class _kvm_xen_vcpu_attr_u_runstate(CStruct):
    _fields_ = [
        ("state", u64),
        ("state_entry_time", u64),
        ("time_running", u64),
        ("time_runnable", u64),
        ("time_blocked", u64),
        ("time_offline", u64),
    ]


class _kvm_xen_vcpu_attr_u_timer(CStruct):
    _fields_ = [
        ("port", u32),
        ("priority", u32),
        ("expires_ns", u64),
    ]


class _kvm_xen_vcpu_attr_u(CUnion):
    _fields_ = [
        ("gpa", u64),
        ("hva", u64),
        ("pad", u64 * 8),
        ("runstate", _kvm_xen_vcpu_attr_u_runstate),
        ("vcpu_id", u32),
        ("timer", _kvm_xen_vcpu_attr_u_timer),
        ("vector", u8),
    ]


class kvm_xen_vcpu_attr(CStruct):
    """A Xen attribute of a vCPU."""

    header = "asm/kvm.h"
    _fields_ = [
        ("type", u16),
        ("pad", u16 * 3),
        ("u", _kvm_xen_vcpu_attr_u),
    ]
