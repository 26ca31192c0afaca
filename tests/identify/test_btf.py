"""Structs in a module's type information: forged, and this machine's own."""

import struct

import pytest

from harness.errors import HostError
from harness.identify.btf import struct_members

INT, STRUCT, ENUM, FUNC_PROTO = 1, 4, 6, 13


def btf(types, strings):
    header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings))
    return header + types + strings


def btf_type(name, kind, vlen, tail):
    return struct.pack("<III", name, kind << 24 | vlen, 0) + tail


@pytest.fixture
def directory(tmp_path):
    """Strings of the module go on where the kernel's own end."""
    base = b"\0cr0\0"
    own = b"cache\0rip\0"
    cache, rip = len(base), len(base) + len(b"cache\0")
    members = struct.pack("<III", 1, 0, 0) + struct.pack("<III", rip, 0, 64)
    types = (
        btf_type(0, INT, 0, bytes(4))
        + btf_type(0, ENUM, 3, bytes(24))
        + btf_type(0, FUNC_PROTO, 2, bytes(16))
        + btf_type(cache, STRUCT, 2, members)
    )
    (tmp_path / "vmlinux").write_bytes(btf(b"", base))
    (tmp_path / "kvm_amd").write_bytes(btf(types, own))
    return tmp_path


def test_members_are_named_from_both_string_tables(directory):
    assert struct_members("kvm_amd", "cache", directory) == ["cr0", "rip"]


def test_a_struct_that_is_not_there_is_none(directory):
    assert struct_members("kvm_amd", "cr0", directory) is None


def test_a_module_without_type_information_is_said(directory):
    with pytest.raises(HostError, match="no type information of kvm_intel: No such file"):
        struct_members("kvm_intel", "cache", directory)


def test_a_type_of_an_unknown_kind_is_said(directory):
    (directory / "kvm_amd").write_bytes(btf(btf_type(0, 31, 0, b""), b""))
    with pytest.raises(HostError, match="unknown kind 31"):
        struct_members("kvm_amd", "cache", directory)


def test_what_is_no_btf_is_said(directory):
    (directory / "kvm_amd").write_bytes(bytes(100))
    with pytest.raises(HostError, match="no BTF"):
        struct_members("kvm_amd", "cache", directory)
