"""The page that a vCPU shares with KVM (linux/kvm.h): ``kvm_run``."""

from __future__ import annotations

import struct

from kvm_ioctl.asm_kvm import kvm_debug_exit_arch, kvm_sync_regs
from kvm_ioctl.cstruct import CStruct, CUnion, packed_format, u8, u16, u32, u64
from kvm_ioctl.linux_kvm import SYNC_REGS_SIZE_BYTES


class _kvm_hyperv_exit_u_synic(CStruct):
    _fields_ = [
        ("msr", u32),
        ("pad2", u32),
        ("control", u64),
        ("evt_page", u64),
        ("msg_page", u64),
    ]


class _kvm_hyperv_exit_u_hcall(CStruct):
    _fields_ = [
        ("input", u64),
        ("result", u64),
        ("params", u64 * 2),
    ]


class _kvm_hyperv_exit_u_syndbg(CStruct):
    _fields_ = [
        ("msr", u32),
        ("pad2", u32),
        ("control", u64),
        ("status", u64),
        ("send_page", u64),
        ("recv_page", u64),
        ("pending_page", u64),
    ]


class _kvm_hyperv_exit_u(CUnion):
    _fields_ = [
        ("synic", _kvm_hyperv_exit_u_synic),
        ("hcall", _kvm_hyperv_exit_u_hcall),
        ("syndbg", _kvm_hyperv_exit_u_syndbg),
    ]


class kvm_hyperv_exit(CStruct):
    """What KVM_EXIT_HYPERV says."""

    header = "linux/kvm.h"
    _fields_ = [
        ("type", u32),
        ("pad1", u32),
        ("u", _kvm_hyperv_exit_u),
    ]


class _kvm_xen_exit_u_hcall(CStruct):
    _fields_ = [
        ("longmode", u32),
        ("cpl", u32),
        ("input", u64),
        ("result", u64),
        ("params", u64 * 6),
    ]


class _kvm_xen_exit_u(CUnion):
    _fields_ = [
        ("hcall", _kvm_xen_exit_u_hcall),
    ]


class kvm_xen_exit(CStruct):
    """What KVM_EXIT_XEN says."""

    header = "linux/kvm.h"
    _fields_ = [
        ("type", u32),
        ("u", _kvm_xen_exit_u),
    ]


class kvm_exit_snp_req_certs(CStruct):
    """What KVM_EXIT_SNP_REQ_CERTS asks for."""

    header = "linux/kvm.h"
    _fields_ = [
        ("gpa", u64),
        ("npages", u64),
        ("ret", u64),
    ]


class _kvm_run_u_hw(CStruct):
    _fields_ = [
        ("hardware_exit_reason", u64),
    ]


class _kvm_run_u_fail_entry(CStruct):
    _fields_ = [
        ("hardware_entry_failure_reason", u64),
        ("cpu", u32),
    ]


class _kvm_run_u_ex(CStruct):
    _fields_ = [
        ("exception", u32),
        ("error_code", u32),
    ]


class _kvm_run_u_io(CStruct):
    _fields_ = [
        ("direction", u8),
        ("size", u8),
        ("port", u16),
        ("count", u32),
        ("data_offset", u64),
    ]


class _kvm_run_u_debug(CStruct):
    _fields_ = [
        ("arch", kvm_debug_exit_arch),
    ]


class _kvm_run_u_mmio(CStruct):
    _fields_ = [
        ("phys_addr", u64),
        ("data", u8 * 8),
        ("len", u32),
        ("is_write", u8),
    ]


class _kvm_run_u_hypercall_u(CUnion):
    _fields_ = [
        ("longmode", u32),
        ("flags", u64),
    ]


class _kvm_run_u_hypercall(CStruct):
    _anonymous_ = ("_u",)
    _fields_ = [
        ("nr", u64),
        ("args", u64 * 6),
        ("ret", u64),
        ("_u", _kvm_run_u_hypercall_u),
    ]


class _kvm_run_u_tpr_access(CStruct):
    _fields_ = [
        ("rip", u64),
        ("is_write", u32),
        ("pad", u32),
    ]


class _kvm_run_u_internal(CStruct):
    _fields_ = [
        ("suberror", u32),
        ("ndata", u32),
        ("data", u64 * 16),
    ]


class _kvm_run_u_emulation_failure_u_s(CStruct):
    _fields_ = [
        ("insn_size", u8),
        ("insn_bytes", u8 * 15),
    ]


class _kvm_run_u_emulation_failure_u(CUnion):
    _anonymous_ = ("_s",)
    _fields_ = [
        ("_s", _kvm_run_u_emulation_failure_u_s),
    ]


class _kvm_run_u_emulation_failure(CStruct):
    _anonymous_ = ("_u",)
    _fields_ = [
        ("suberror", u32),
        ("ndata", u32),
        ("flags", u64),
        ("_u", _kvm_run_u_emulation_failure_u),
    ]


class _kvm_run_u_system_event_u(CUnion):
    _fields_ = [
        ("flags", u64),
        ("data", u64 * 16),
    ]


class _kvm_run_u_system_event(CStruct):
    _anonymous_ = ("_u",)
    _fields_ = [
        ("type", u32),
        ("ndata", u32),
        ("_u", _kvm_run_u_system_event_u),
    ]


class _kvm_run_u_eoi(CStruct):
    _fields_ = [
        ("vector", u8),
    ]


class _kvm_run_u_msr(CStruct):
    _fields_ = [
        ("error", u8),
        ("pad", u8 * 7),
        ("reason", u32),
        ("index", u32),
        ("data", u64),
    ]


class _kvm_run_u_notify(CStruct):
    _fields_ = [
        ("flags", u32),
    ]


class _kvm_run_u_memory_fault(CStruct):
    _fields_ = [
        ("flags", u64),
        ("gpa", u64),
        ("size", u64),
    ]


class _kvm_run_u_tdx_u_unknown(CStruct):
    _fields_ = [
        ("ret", u64),
        ("data", u64 * 5),
    ]


class _kvm_run_u_tdx_u_get_quote(CStruct):
    _fields_ = [
        ("ret", u64),
        ("gpa", u64),
        ("size", u64),
    ]


class _kvm_run_u_tdx_u_get_tdvmcall_info(CStruct):
    _fields_ = [
        ("ret", u64),
        ("leaf", u64),
        ("r11", u64),
        ("r12", u64),
        ("r13", u64),
        ("r14", u64),
    ]


class _kvm_run_u_tdx_u_setup_event_notify(CStruct):
    _fields_ = [
        ("ret", u64),
        ("vector", u64),
    ]


class _kvm_run_u_tdx_u(CUnion):
    _fields_ = [
        ("unknown", _kvm_run_u_tdx_u_unknown),
        ("get_quote", _kvm_run_u_tdx_u_get_quote),
        ("get_tdvmcall_info", _kvm_run_u_tdx_u_get_tdvmcall_info),
        ("setup_event_notify", _kvm_run_u_tdx_u_setup_event_notify),
    ]


class _kvm_run_u_tdx(CStruct):
    _anonymous_ = ("_u",)
    _fields_ = [
        ("flags", u64),
        ("nr", u64),
        ("_u", _kvm_run_u_tdx_u),
    ]


class _kvm_run_u(CUnion):
    _fields_ = [
        ("hw", _kvm_run_u_hw),
        ("fail_entry", _kvm_run_u_fail_entry),
        ("ex", _kvm_run_u_ex),
        ("io", _kvm_run_u_io),
        ("debug", _kvm_run_u_debug),
        ("mmio", _kvm_run_u_mmio),
        ("hypercall", _kvm_run_u_hypercall),
        ("tpr_access", _kvm_run_u_tpr_access),
        ("internal", _kvm_run_u_internal),
        ("emulation_failure", _kvm_run_u_emulation_failure),
        ("system_event", _kvm_run_u_system_event),
        ("eoi", _kvm_run_u_eoi),
        ("hyperv", kvm_hyperv_exit),
        ("msr", _kvm_run_u_msr),
        ("xen", kvm_xen_exit),
        ("notify", _kvm_run_u_notify),
        ("memory_fault", _kvm_run_u_memory_fault),
        ("tdx", _kvm_run_u_tdx),
        ("snp_req_certs", kvm_exit_snp_req_certs),
        ("padding", u8 * 256),
    ]


class _kvm_run_s(CUnion):
    _fields_ = [
        ("regs", kvm_sync_regs),
        ("padding", u8 * SYNC_REGS_SIZE_BYTES),
    ]


class kvm_run(CStruct):
    """Shared with KVM: why KVM_RUN returned, and what the next one shall do.

    Members of the exit union that only other architectures use are left out.
    """

    header = "linux/kvm.h"
    _anonymous_ = ("_u",)
    _fields_ = [
        ("request_interrupt_window", u8),
        ("immediate_exit", u8),
        ("padding1", u8 * 6),
        ("exit_reason", u32),
        ("ready_for_interrupt_injection", u8),
        ("if_flag", u8),
        ("flags", u16),
        ("cr8", u64),
        ("apic_base", u64),
        ("_u", _kvm_run_u),
        ("kvm_valid_regs", u64),
        ("kvm_dirty_regs", u64),
        ("s", _kvm_run_s),
    ]

    def reason_and_io(self) -> tuple[int, int, int, int, int, int]:
        """Return ``exit_reason`` and all fields of ``io``: of nearly every exit that is all."""
        return _REASON_AND_IO.unpack_from(self._buffer, _REASON_OFFSET)

    def shared_bytes(self, offset: int, size_bytes: int) -> bytes:
        """Return what is this far from the start of the page, in memory that this lies over."""
        return bytes(self._buffer[offset : offset + size_bytes])


_REASON_OFFSET: int = kvm_run.exit_reason.offset
_GAP_BYTES = kvm_run.io.offset - _REASON_OFFSET - kvm_run.exit_reason.size
_REASON_AND_IO = struct.Struct(
    f"@I{_GAP_BYTES}x" + packed_format(_kvm_run_u_io).format.removeprefix("@")
)
