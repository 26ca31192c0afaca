"""Structs and constants of asm/kvm.h (x86): confidential guests (SEV, SEV-SNP, TDX)."""

from __future__ import annotations

from enum import IntEnum, IntFlag

from kvm_ioctl.asm_kvm import kvm_cpuid2, kvm_cpuid_entry2
from kvm_ioctl.cstruct import CStruct, FlexArray, u8, u16, u32, u64

KVM_SEV_SNP_ID_BLOCK_SIZE = 0x60
KVM_SEV_SNP_ID_AUTH_SIZE = 0x1000
KVM_SEV_SNP_FINISH_DATA_SIZE = 32


class SevCommand(IntEnum):
    """``kvm_sev_cmd.id`` (enum sev_cmd_id)."""

    KVM_SEV_INIT = 0
    KVM_SEV_ES_INIT = 1
    KVM_SEV_LAUNCH_START = 2
    KVM_SEV_LAUNCH_UPDATE_DATA = 3
    KVM_SEV_LAUNCH_UPDATE_VMSA = 4
    KVM_SEV_LAUNCH_SECRET = 5
    KVM_SEV_LAUNCH_MEASURE = 6
    KVM_SEV_LAUNCH_FINISH = 7
    KVM_SEV_SEND_START = 8
    KVM_SEV_SEND_UPDATE_DATA = 9
    KVM_SEV_SEND_UPDATE_VMSA = 10
    KVM_SEV_SEND_FINISH = 11
    KVM_SEV_RECEIVE_START = 12
    KVM_SEV_RECEIVE_UPDATE_DATA = 13
    KVM_SEV_RECEIVE_UPDATE_VMSA = 14
    KVM_SEV_RECEIVE_FINISH = 15
    KVM_SEV_GUEST_STATUS = 16
    KVM_SEV_DBG_DECRYPT = 17
    KVM_SEV_DBG_ENCRYPT = 18
    KVM_SEV_CERT_EXPORT = 19
    KVM_SEV_GET_ATTESTATION_REPORT = 20
    KVM_SEV_SEND_CANCEL = 21
    KVM_SEV_INIT2 = 22
    KVM_SEV_SNP_LAUNCH_START = 100
    KVM_SEV_SNP_LAUNCH_UPDATE = 101
    KVM_SEV_SNP_LAUNCH_FINISH = 102
    KVM_SEV_SNP_ENABLE_REQ_CERTS = 103


class SnpPageType(IntEnum):
    """``kvm_sev_snp_launch_update.type``."""

    KVM_SEV_PAGE_TYPE_INVALID = 0
    KVM_SEV_SNP_PAGE_TYPE_NORMAL = 1
    KVM_SEV_SNP_PAGE_TYPE_ZERO = 3
    KVM_SEV_SNP_PAGE_TYPE_UNMEASURED = 4
    KVM_SEV_SNP_PAGE_TYPE_SECRETS = 5
    KVM_SEV_SNP_PAGE_TYPE_CPUID = 6


class TdxCommand(IntEnum):
    """``kvm_tdx_cmd.id`` (enum kvm_tdx_cmd_id)."""

    KVM_TDX_CAPABILITIES = 0
    KVM_TDX_INIT_VM = 1
    KVM_TDX_INIT_VCPU = 2
    KVM_TDX_INIT_MEM_REGION = 3
    KVM_TDX_FINALIZE_VM = 4
    KVM_TDX_GET_CPUID = 5


class TdxInitMemRegionFlags(IntFlag):
    """``kvm_tdx_cmd.flags`` of KVM_TDX_INIT_MEM_REGION."""

    KVM_TDX_MEASURE_MEMORY_REGION = 1 << 0


class kvm_sev_cmd(CStruct):
    """An SEV command, payload of KVM_MEMORY_ENCRYPT_OP."""

    header = "asm/kvm.h"
    _fields_ = [
        ("id", u32),
        ("pad0", u32),
        ("data", u64),
        ("error", u32),
        ("sev_fd", u32),
    ]


class kvm_sev_init(CStruct):
    """KVM_SEV_INIT2."""

    header = "asm/kvm.h"
    _fields_ = [
        ("vmsa_features", u64),
        ("flags", u32),
        ("ghcb_version", u16),
        ("pad1", u16),
        ("pad2", u32 * 8),
    ]


class kvm_sev_launch_start(CStruct):
    """KVM_SEV_LAUNCH_START."""

    header = "asm/kvm.h"
    _fields_ = [
        ("handle", u32),
        ("policy", u32),
        ("dh_uaddr", u64),
        ("dh_len", u32),
        ("pad0", u32),
        ("session_uaddr", u64),
        ("session_len", u32),
        ("pad1", u32),
    ]


class kvm_sev_launch_update_data(CStruct):
    """KVM_SEV_LAUNCH_UPDATE_DATA."""

    header = "asm/kvm.h"
    _fields_ = [
        ("uaddr", u64),
        ("len", u32),
        ("pad0", u32),
    ]


class kvm_sev_launch_secret(CStruct):
    """KVM_SEV_LAUNCH_SECRET."""

    header = "asm/kvm.h"
    _fields_ = [
        ("hdr_uaddr", u64),
        ("hdr_len", u32),
        ("pad0", u32),
        ("guest_uaddr", u64),
        ("guest_len", u32),
        ("pad1", u32),
        ("trans_uaddr", u64),
        ("trans_len", u32),
        ("pad2", u32),
    ]


class kvm_sev_launch_measure(CStruct):
    """KVM_SEV_LAUNCH_MEASURE."""

    header = "asm/kvm.h"
    _fields_ = [
        ("uaddr", u64),
        ("len", u32),
        ("pad0", u32),
    ]


class kvm_sev_guest_status(CStruct):
    """KVM_SEV_GUEST_STATUS."""

    header = "asm/kvm.h"
    _fields_ = [
        ("handle", u32),
        ("policy", u32),
        ("state", u32),
    ]


class kvm_sev_dbg(CStruct):
    """KVM_SEV_DBG_DECRYPT and KVM_SEV_DBG_ENCRYPT."""

    header = "asm/kvm.h"
    _fields_ = [
        ("src_uaddr", u64),
        ("dst_uaddr", u64),
        ("len", u32),
        ("pad0", u32),
    ]


class kvm_sev_attestation_report(CStruct):
    """KVM_SEV_GET_ATTESTATION_REPORT."""

    header = "asm/kvm.h"
    _fields_ = [
        ("mnonce", u8 * 16),
        ("uaddr", u64),
        ("len", u32),
        ("pad0", u32),
    ]


class kvm_sev_send_start(CStruct):
    """KVM_SEV_SEND_START."""

    header = "asm/kvm.h"
    _fields_ = [
        ("policy", u32),
        ("pad0", u32),
        ("pdh_cert_uaddr", u64),
        ("pdh_cert_len", u32),
        ("pad1", u32),
        ("plat_certs_uaddr", u64),
        ("plat_certs_len", u32),
        ("pad2", u32),
        ("amd_certs_uaddr", u64),
        ("amd_certs_len", u32),
        ("pad3", u32),
        ("session_uaddr", u64),
        ("session_len", u32),
        ("pad4", u32),
    ]


class kvm_sev_send_update_data(CStruct):
    """KVM_SEV_SEND_UPDATE_DATA."""

    header = "asm/kvm.h"
    _fields_ = [
        ("hdr_uaddr", u64),
        ("hdr_len", u32),
        ("pad0", u32),
        ("guest_uaddr", u64),
        ("guest_len", u32),
        ("pad1", u32),
        ("trans_uaddr", u64),
        ("trans_len", u32),
        ("pad2", u32),
    ]


class kvm_sev_receive_start(CStruct):
    """KVM_SEV_RECEIVE_START."""

    header = "asm/kvm.h"
    _fields_ = [
        ("handle", u32),
        ("policy", u32),
        ("pdh_uaddr", u64),
        ("pdh_len", u32),
        ("pad0", u32),
        ("session_uaddr", u64),
        ("session_len", u32),
        ("pad1", u32),
    ]


class kvm_sev_receive_update_data(CStruct):
    """KVM_SEV_RECEIVE_UPDATE_DATA."""

    header = "asm/kvm.h"
    _fields_ = [
        ("hdr_uaddr", u64),
        ("hdr_len", u32),
        ("pad0", u32),
        ("guest_uaddr", u64),
        ("guest_len", u32),
        ("pad1", u32),
        ("trans_uaddr", u64),
        ("trans_len", u32),
        ("pad2", u32),
    ]


class kvm_sev_snp_launch_start(CStruct):
    """KVM_SEV_SNP_LAUNCH_START."""

    header = "asm/kvm.h"
    _fields_ = [
        ("policy", u64),
        ("gosvw", u8 * 16),
        ("flags", u16),
        ("pad0", u8 * 6),
        ("pad1", u64 * 4),
    ]


class kvm_sev_snp_launch_update(CStruct):
    """KVM_SEV_SNP_LAUNCH_UPDATE."""

    header = "asm/kvm.h"
    _fields_ = [
        ("gfn_start", u64),
        ("uaddr", u64),
        ("len", u64),
        ("type", u8),
        ("pad0", u8),
        ("flags", u16),
        ("pad1", u32),
        ("pad2", u64 * 4),
    ]


class kvm_sev_snp_launch_finish(CStruct):
    """KVM_SEV_SNP_LAUNCH_FINISH."""

    header = "asm/kvm.h"
    _fields_ = [
        ("id_block_uaddr", u64),
        ("id_auth_uaddr", u64),
        ("id_block_en", u8),
        ("auth_key_en", u8),
        ("vcek_disabled", u8),
        ("host_data", u8 * KVM_SEV_SNP_FINISH_DATA_SIZE),
        ("pad0", u8 * 3),
        ("flags", u16),
        ("pad1", u64 * 4),
    ]


class kvm_tdx_cmd(CStruct):
    """A TDX command, payload of KVM_MEMORY_ENCRYPT_OP."""

    header = "asm/kvm.h"
    _fields_ = [
        ("id", u32),
        ("flags", u32),
        ("data", u64),
        ("hw_error", u64),
    ]


class kvm_tdx_capabilities(CStruct):
    """KVM_TDX_CAPABILITIES."""

    header = "asm/kvm.h"
    _fields_ = [
        ("supported_attrs", u64),
        ("supported_xfam", u64),
        ("kernel_tdvmcallinfo_1_r11", u64),
        ("user_tdvmcallinfo_1_r11", u64),
        ("kernel_tdvmcallinfo_1_r12", u64),
        ("user_tdvmcallinfo_1_r12", u64),
        ("reserved", u64 * 250),
        ("cpuid", kvm_cpuid2),
    ]
    entries = FlexArray(kvm_cpuid_entry2, count="cpuid.nent", path="cpuid.entries")


class kvm_tdx_init_vm(CStruct):
    """KVM_TDX_INIT_VM."""

    header = "asm/kvm.h"
    _fields_ = [
        ("attributes", u64),
        ("xfam", u64),
        ("mrconfigid", u64 * 6),
        ("mrowner", u64 * 6),
        ("mrownerconfig", u64 * 6),
        ("reserved", u64 * 12),
        ("cpuid", kvm_cpuid2),
    ]
    entries = FlexArray(kvm_cpuid_entry2, count="cpuid.nent", path="cpuid.entries")


class kvm_tdx_init_mem_region(CStruct):
    """KVM_TDX_INIT_MEM_REGION."""

    header = "asm/kvm.h"
    _fields_ = [
        ("source_addr", u64),
        ("gpa", u64),
        ("nr_pages", u64),
    ]
