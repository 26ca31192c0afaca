"""The declarations against the recorded ABI, against kernel headers, and for completeness."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from kvm_ioctl import abi
from kvm_ioctl.capabilities import Cap

NOT_X86 = {
    r"KVM_(CREATE|ALLOCATE|PPC)_(SPAPR|RMA).*": "powerpc: IOMMU tables, real-mode area",
    r"KVM_PPC_.*|KVM_DIRTY_TLB": "powerpc",
    r"KVM_S390_.*": "s390",
    r"KVM_ARM_.*": "arm and arm64",
}
"""Requests left out on purpose, and whose they are."""

REMOVED = {
    r"KVM_SET_MEMORY_(REGION|ALIAS)": "never implemented, or replaced by user memory regions",
    r"KVM_(ASSIGN|DEASSIGN)_.*": "device assignment, replaced by VFIO",
}
"""Requests that headers of older kernels still have, without a kernel that takes them."""

NOT_X86_STRUCTS = {
    "kvm_irq_routing_s390_adapter": "s390",
    "kvm_s390_keyop": "s390",
    "kvm_config_tlb": "powerpc",
    "kvm_dirty_tlb": "powerpc",
    "kvm_vfio_spapr_tce": "powerpc",
    "kvm_arm_device_addr": "arm",
}

CONSTANTS_LEFT_OUT = {
    r"KVM_S390_.*|KVM_VM_S390_.*|.*_S390_ADAPTER": "s390",
    r"KVM_VM_(TYPE_ARM|PPC|MIPS)_.*|.*ARM_SEA.*|KVM_MMU_FSL_.*|.*_SPAPR_TCE": "other architectures",
    r"KVM_REG_(GENERIC|PPC|IA64|ARM|S390|ARM64|MIPS|RISCV|LOONGARCH)": "other architectures",
    r".*_(MASK|MAX|SHIFT|VALID_FIELDS)": "derived from constants that are declared",
    r"KVM_DEV_VFIO_GROUP.*": "old names of KVM_DEV_VFIO_FILE*",
    r"KVM_COALESCED_MMIO_MAX": "needs PAGE_SIZE; CoalescedRing derives it",
}


def headers() -> Path:
    path = Path(os.environ.get("NSVM_KERNEL_HEADERS", "/usr/include"))
    if "NSVM_KERNEL_HEADERS" not in os.environ and not (path / "linux/kvm.h").exists():
        pytest.skip(f"no kernel headers in {path}, and NSVM_KERNEL_HEADERS names none")
    return path


def new_headers() -> Path:
    """Headers without what has been removed, or moved to other architectures, since."""
    path, recorded = headers(), abi.Record.load().kernel
    if (version := abi.kernel_version(path)) < recorded:
        pytest.skip(f"the headers in {path} are {version}, older than the recorded {recorded}")
    return path


def compiler() -> str:
    path = shutil.which("cc")
    if path is None:
        pytest.skip("this machine has no C compiler (cc)")
    return path


def left_out(name: str, reasons: dict[str, str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in reasons)


def test_declarations_equal_the_record() -> None:
    record, declared = abi.Record.load().facts, abi.declared()
    assert {e: (record.get(e), declared.get(e)) for e in record.keys() | declared.keys()
            if record.get(e) != declared.get(e)} == {}  # fmt: skip


def test_record_holds_facts_of_every_kind() -> None:
    facts = abi.Record.load().facts
    assert facts["offsetof(struct kvm_regs, rip)"] == 128
    assert facts["offsetof(struct kvm_run, io.data_offset)"] == 40
    assert facts["offsetof(struct kvm_nested_state, hdr.svm)"] == 8
    assert facts["offsetof(struct kvm_svm_nested_state_hdr, gpat)"] == 8
    assert facts["bits(struct kvm_ioapic_state, redirtbl[0].fields.mask)"] == 26 << 8 | 1
    assert facts["KVM_GET_NESTED_STATE"] == 0xC080AEBE
    assert facts["KVM_CAP_NESTED_STATE"] == 157


def test_every_request_is_in_the_record_and_named_for_its_attribute() -> None:
    facts = abi.Record.load().facts
    for table in abi.request_tables():
        for name, request in ((r.name, r) for r in abi.ioctls(table)):
            assert vars(table)[name] is request
            assert facts[name] == request.number


@pytest.mark.parametrize("table", list(abi.request_tables()), ids=lambda table: table.__name__)
def test_requests_are_in_number_order(table: type) -> None:
    numbers = [request.number & 0xFF for request in abi.ioctls(table)]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize("table", list(abi.request_tables()), ids=lambda table: table.__name__)
def test_capabilities_of_requests_are_capabilities(table: type) -> None:
    caps = [request.cap for request in abi.ioctls(table) if request.cap is not None]
    assert caps
    assert all(isinstance(cap, Cap) for cap in caps)


@pytest.mark.abi
def test_headers_agree_with_the_declarations(capsys: pytest.CaptureFixture[str]) -> None:
    comparison = abi.compare(abi.declared(), headers(), compiler())
    assert comparison.differing == []
    recorded = abi.Record.load().kernel
    if comparison.kernel < recorded:
        kernel = ".".join(map(str, comparison.kernel))
        with capsys.disabled():
            print(f" [headers of {kernel} are silent on {len(comparison.unknown)} facts] ", end="")
        assert len(comparison.unknown) < len(abi.declared()) / 2
    else:
        assert comparison.unknown == []


@pytest.mark.abi
@pytest.mark.parametrize(
    ("expression", "wrong"),
    [
        ("offsetof(struct kvm_regs, rip)", 120),
        ("sizeof(struct kvm_sregs)", 304),
        ("KVM_SET_SREGS", 0x4138AE85),
        ("KVM_CAP_SREGS2", 201),
        ("bits(struct kvm_ioapic_state, redirtbl[0].fields.mask)", 26 << 8 | 2),
    ],
)
def test_wrong_declaration_is_named(expression: str, wrong: int) -> None:
    right = abi.declared()[expression]
    comparison = abi.compare({expression: wrong}, headers(), compiler())
    assert comparison.differing == [f"{expression} is {right}, declared {wrong}"]


@pytest.mark.abi
def test_what_headers_do_not_know_is_named() -> None:
    claimed = {"KVM_GET_REGS": abi.declared()["KVM_GET_REGS"], "KVM_NO_SUCH_REQUEST": 1}
    comparison = abi.compare(claimed, headers(), compiler())
    assert comparison.unknown == ["KVM_NO_SUCH_REQUEST"]
    assert comparison.differing == []


def test_missing_headers_and_compiler_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert abi.main(["--headers", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: no linux/kvm.h below {tmp_path}\n"
    (tmp_path / "linux").mkdir()
    (tmp_path / "linux/kvm.h").touch()
    assert abi.main(["--headers", str(tmp_path), "--compiler", "no-such-cc"]) == 2
    assert "cannot run the compiler no-such-cc" in capsys.readouterr().err


# Completeness: what the headers have, the tables have, or someone said why not.


@pytest.mark.abi
def test_every_request_of_the_headers_is_declared() -> None:
    text = abi.header_texts(headers())["linux/kvm.h"]
    in_headers = re.findall(r"^#define\s+(KVM_\w+)\s+(?:\\\n\s*)?_IO\w*\(KVMIO", text, re.M)
    assert len(in_headers) > 100
    ours = {request.name for table in abi.request_tables() for request in abi.ioctls(table)}
    reasons = NOT_X86 | REMOVED
    assert [n for n in in_headers if n not in ours and not left_out(n, reasons)] == []


@pytest.mark.abi
@pytest.mark.parametrize("prefix", ["KVM_CAP_", "KVM_EXIT_"])
def test_every_capability_and_exit_of_the_headers_is_declared(prefix: str) -> None:
    text = abi.header_texts(headers())["linux/kvm.h"]
    in_headers = re.findall(rf"^#define\s+({prefix}\w+)\s+\d+", text, re.M)
    assert len(in_headers) > 30
    declared = abi.declared()
    assert [name for name in in_headers if name not in declared] == []


@pytest.mark.abi
@pytest.mark.parametrize("header", ["linux/kvm.h", "asm/kvm.h"])
def test_every_constant_of_the_headers_is_declared(header: str) -> None:
    text = abi.header_texts(new_headers())[header]
    pattern = r"^\s*#\s*define\s+((?:\w+_VECTOR|KVM\w*|GUEST_MEMFD\w+)\b)(?!\()\s+\S"
    in_headers = [n for n in re.findall(pattern, text, re.M) if not left_out(n, NOT_X86)]
    assert len(in_headers) > 80
    missing = [n for n in in_headers if n not in abi.declared()]
    assert [n for n in missing if not left_out(n, CONSTANTS_LEFT_OUT)] == []


@pytest.mark.abi
@pytest.mark.parametrize("header", ["linux/kvm.h", "asm/kvm.h"])
def test_every_struct_of_the_headers_is_declared(header: str) -> None:
    text = abi.header_texts(new_headers())[header]
    in_headers = re.findall(r"^struct (kvm_\w+) \{", text, re.M)
    assert len(in_headers) > 30
    ours = {struct.__name__: struct.header for struct in abi.structs()}
    assert [n for n in in_headers if n not in ours and n not in NOT_X86_STRUCTS] == []
    assert [n for n in in_headers if ours.get(n, header) != header] == []
