"""Coalesced port and MMIO writes on a real /dev/kvm."""

from __future__ import annotations

import pytest

from kvm_ioctl import exits
from kvm_ioctl.handles import CoalescedWrite, Vm

pytestmark = pytest.mark.kvm


def test_coalesced_writes_are_collected_in_order(guest, vm: Vm) -> None:
    vm.register_coalesced_pio(0xF8, 1)
    machine = guest("b041 e6f8 b042 e6f8 f4")
    ring = machine.vcpu.coalesced_ring()
    assert machine.vcpu.enter() == exits.HltExit()
    assert ring.drain() == [CoalescedWrite(0xF8, b"A", True), CoalescedWrite(0xF8, b"B", True)]
    assert ring.drain() == []


def test_coalesced_ring_goes_round(guest, vm: Vm) -> None:
    vm.register_coalesced_mmio(0x9000, 8)
    machine = guest("b041 a20090 fec0 ebf9")  # al=0x41; store; inc al; loop
    ring = machine.vcpu.coalesced_ring()
    collected = []
    for _ in range(4):
        # A full ring exits; what did not fit comes as an exit.
        exit_ = machine.vcpu.enter()
        collected += [write.data[0] for write in ring.drain()] + [exit_.data[0]]
    assert collected == [(0x41 + i) & 0xFF for i in range(len(collected))]
    assert len(collected) > 2 * ring.capacity
