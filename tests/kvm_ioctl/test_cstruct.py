from __future__ import annotations

import ctypes
import gc

import pytest

from kvm_ioctl.asm_kvm import (
    kvm_cpuid2,
    kvm_cpuid_entry2,
    kvm_msr_entry,
    kvm_msr_list,
    kvm_msrs,
    kvm_nested_state,
    kvm_regs,
    kvm_sregs,
    kvm_xcr,
    kvm_xsave,
)
from kvm_ioctl.asm_kvm_coco import kvm_tdx_init_vm
from kvm_ioctl.cstruct import CStruct, field_names, packed_format
from kvm_ioctl.kvm_run import _kvm_run_u_io
from kvm_ioctl.linux_kvm import kvm_dirty_log, kvm_signal_mask


def test_misspelled_field_is_refused_when_set() -> None:
    with pytest.raises(AttributeError, match="rpi"):
        kvm_regs().rpi = 1
    with pytest.raises(AttributeError, match="adr"):
        kvm_nested_state().hdr.svm.adr = 1


def test_with_tail_fills_a_count_of_entries() -> None:
    msrs = kvm_msrs.with_tail(3)
    assert (msrs.nmsrs, len(msrs.entries), msrs.allocated_bytes) == (3, 3, 8 + 3 * 16)


def test_with_tail_fills_a_size_in_bytes() -> None:
    state = kvm_nested_state.with_tail(4096)
    assert (state.size, len(state.data)) == (4224, 4096)


def test_with_tail_fills_a_count_in_an_embedded_struct() -> None:
    init = kvm_tdx_init_vm.with_tail(2)
    assert init.cpuid.nent == 2
    assert len(init.entries) == 2


def test_with_tail_is_refused_without_flexible_array() -> None:
    with pytest.raises(TypeError, match="kvm_regs has no flexible array"):
        kvm_regs.with_tail(1)


def test_tail_is_as_long_as_the_header_says_and_never_longer_than_its_memory() -> None:
    msrs = kvm_msrs.with_tail(3)
    msrs.nmsrs = 2
    assert len(msrs.tail) == 2
    msrs.nmsrs = 1000
    assert len(msrs.tail) == 3


def test_tail_writes_go_to_the_struct() -> None:
    msrs = kvm_msrs.with_tail(2)
    msrs.entries[1].index = 0xC0000080
    assert msrs.as_bytes()[24:28] == (0xC0000080).to_bytes(4, "little")


def test_tail_keeps_its_struct_alive() -> None:
    entries = kvm_cpuid2.with_tail(1000).entries
    gc.collect()
    kvm_cpuid2.with_tail(1000).entries[0].eax = 1
    assert all(bytes(entry) == bytes(40) for entry in entries)


def test_nested_state_outside_guest_mode_has_no_data() -> None:
    state = kvm_nested_state.with_tail(4096)
    state.data[0] = 7
    state.size = 128
    assert len(state.data) == 0
    assert len(state.as_bytes()) == 128


def test_from_bytes_and_as_bytes_round_trip() -> None:
    data = bytes(range(24))
    msrs = kvm_msrs.from_bytes((1).to_bytes(8, "little") + data[:16])
    assert msrs.as_bytes()[8:] == data[:16]
    assert kvm_msr_list.from_bytes(bytes([2, 0, 0, 0, 1, 0, 0, 0, 5, 0, 0, 0])).indices[1] == 5


@pytest.mark.parametrize("size", [0, 143, 145])
def test_from_bytes_refuses_another_length(size: int) -> None:
    with pytest.raises(ValueError, match=f"kvm_regs has 144 bytes, got {size}"):
        kvm_regs.from_bytes(bytes(size))


def test_copy_is_independent_and_keeps_the_allocation() -> None:
    state = kvm_nested_state.with_tail(4096)
    state.size = 128
    copy = state.copy()
    copy.hdr.svm.vmcb_pa = 0x1000
    assert copy.allocated_bytes == 4224
    assert state.hdr.svm.vmcb_pa == 0


def test_clear_zeroes_all_and_claims_the_whole_tail_again() -> None:
    msrs = kvm_msrs.with_tail(2)
    msrs.entries[1].data = 9
    msrs.nmsrs = 1
    msrs.clear()
    assert msrs.nmsrs == 2
    assert msrs.entries[1].data == 0


def test_same_as_looks_at_reserved_fields_and_at_the_type() -> None:
    a, b = kvm_cpuid_entry2(eax=1), kvm_cpuid_entry2(eax=1)
    assert a.same_as(b)
    b.padding[2] = 1
    assert not a.same_as(b)
    assert not kvm_regs().same_as(kvm_sregs())


def test_first_difference_names_the_field_and_both_values() -> None:
    a, b = kvm_sregs(efer=0x1000), kvm_sregs(efer=0x1000)
    assert a.first_difference(b) is None
    b.interrupt_bitmap[3] = 5
    b.cs.base = 0x10
    assert a.first_difference(b) == ("cs.base", 0, 0x10)
    b.cs.base = 0
    assert a.first_difference(b) == ("interrupt_bitmap[0x3]", 0, 5)


def test_first_difference_reaches_into_tails() -> None:
    a, b = kvm_msrs.with_tail(2), kvm_msrs.with_tail(2)
    b.entries[1].data = 3
    assert a.first_difference(b) == ("entries[0x1].data", 0, 3)
    assert a.first_difference(kvm_msrs.with_tail(1)) == ("nmsrs", 2, 1)


def test_fields_dict_is_plain_data() -> None:
    log = kvm_dirty_log(slot=3).fields_dict()
    assert log == {"slot": 3, "padding1": 0, "dirty_bitmap": 0, "padding2": 0}
    assert kvm_signal_mask.with_tail(8).fields_dict() == {"len": 8, "sigset": bytes(8)}


def test_repr_shows_what_is_set_and_summarizes_the_long() -> None:
    assert repr(kvm_regs(rip=0x1000)) == "kvm_regs(rip=0x1000)"
    xsave = kvm_xsave()
    xsave.region[0] = 0x37F
    assert repr(xsave) == "kvm_xsave(region=<1024 entries, 1 not zero>)"


@pytest.mark.parametrize("kind", [kvm_regs, kvm_msr_entry, kvm_xcr, _kvm_run_u_io])
def test_packed_format_reads_every_field_as_ctypes_does(kind: type[CStruct]) -> None:
    data = bytes(range(1, ctypes.sizeof(kind) + 1))
    struct = kind.from_bytes(data)
    by_ctypes = [getattr(struct, name) for name in field_names(kind)]
    assert list(packed_format(kind).unpack_from(data)) == by_ctypes


def test_packed_format_is_for_integers_only() -> None:
    with pytest.raises(TypeError, match=r"kvm_sregs\.cs is no integer"):
        packed_format(kvm_sregs)
