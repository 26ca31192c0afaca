"""SMRAM whose handler counts SMIs and does nothing else: firmware that leaves all as it was.

APM vol. 2, 10.2 SMM Resources. It lies where a PC's chipset hides it, at 0xa0000, and only a vCPU
in SMM sees it (KVM_CAP_MULTI_ADDRESS_SPACE); so no memory of the guest's is taken for it. Every
vCPU has an SMBASE of its own, for a save area of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from harness.errors import ScenarioFailure
from harness.machine.addresses import Gpa
from harness.machine.errors import MachineError
from harness.machine.machine import Machine
from harness.machine.memory import SMRAM_AS_ID
from harness.machine.memory_map import CONVENTIONAL_END
from harness.svm.msrs import Msr
from harness.svm.smram import SMM_ENTRY_OFFSET, SMRAM_STATE_OFFSET, kvm_smram_state_64
from kvm_ioctl.linux_kvm import kvm_msi

SMRAM_GPA: Final = Gpa(CONVENTIONAL_END)
SMRAM_BYTES: Final = 128 << 10
MAX_SMI_VCPUS: Final = 4

_STRIDE: Final = 0x1000
"""From one vCPU's SMBASE to the next: neither handlers nor save areas overlap."""

_COUNT_OFFSET: Final = SMM_ENTRY_OFFSET + 0x800
_HANDLER: Final = bytes.fromhex(
    "2e66ff060088"  # inc dword cs:[_COUNT_OFFSET]
    "0faa"  # rsm
)

_APIC_GPA: Final = 0xFEE0_0000
_DELIVERY_SMI: Final = 2 << 8
"""Delivery mode in an MSI's data (APM vol. 2, 16.5)."""

_POLL_S: Final = 0.001


class Way(StrEnum):
    """How an SMI is sent."""

    IOCTL = "KVM_SMI"
    """The vCPU is got out of KVM_RUN for it, whatever it does there."""
    MESSAGE = "KVM_SIGNAL_MSI"
    """To the local APIC, while the vCPU runs."""


@dataclass(frozen=True)
class CountedSmi:
    """One SMI, as the save area tells of it."""

    vcpu: int
    way: Way
    svm_guest: bool
    """It interrupted a guest of L1."""
    seconds: float
    """From being sent to the handler."""


def add_smram(machine: Machine) -> None:
    """Show all memory in SMM too, and SMRAM with the handlers; before there are vCPUs.

    Raises KvmError: KVM has one address space only.
    """
    memory = machine.memory
    for slot in memory.slots():
        memory.alias(slot, as_id=SMRAM_AS_ID, flags=slot.flags)
    memory.add(SMRAM_GPA, SMRAM_BYTES, as_id=SMRAM_AS_ID)
    for index in range(MAX_SMI_VCPUS):
        memory.write(Gpa(_smbase(index) + SMM_ENTRY_OFFSET), _HANDLER, SMRAM_AS_ID)


def set_smbases(machine: Machine) -> None:
    """Tell every vCPU where its part of SMRAM is.

    Raises MachineError: there are too many.
    """
    if len(machine.vcpus) > MAX_SMI_VCPUS:
        raise MachineError(f"SMRAM is for {MAX_SMI_VCPUS} vCPUs, not {len(machine.vcpus)}")
    for runner in machine.vcpus:
        runner.vcpu.set_msrs({Msr.MSR_IA32_SMBASE: _smbase(runner.index)})


def count_smis(machine: Machine, index: int) -> int:
    """Return how often a vCPU's handler was entered."""
    at = Gpa(_smbase(index) + _COUNT_OFFSET)
    return machine.memory.read_int(at, 4, SMRAM_AS_ID)


def send_smi(
    machine: Machine,
    index: int,
    way: Way,
    *,
    timeout_s: float,
    ended: Callable[[], bool] = lambda: False,
) -> CountedSmi:
    """Send a running vCPU one SMI and wait for its handler; nobody else may send any meanwhile.

    Args:
        machine: with `add_smram` and `set_smbases`.
        index: of the vCPU.
        way: how.
        timeout_s: how long it may take.
        ended: tells whether the machine runs no more.

    Raises ScenarioFailure: it was not taken in time.

    """
    before = count_smis(machine, index)
    started = time.monotonic()
    _send(machine, index, way)
    while (count := count_smis(machine, index)) == before:
        if time.monotonic() - started > timeout_s or ended():
            why = "before the machine ended" if ended() else f"within {timeout_s:g} s"
            raise ScenarioFailure(f"vCPU {index} did not take an SMI ({way}) {why}")
        time.sleep(_POLL_S)
    if count != before + 1:
        raise ScenarioFailure(f"vCPU {index} took one SMI ({way}) {count - before} times")
    seconds = time.monotonic() - started
    place = Gpa(_smbase(index) + SMRAM_STATE_OFFSET)
    area = machine.memory.read_struct(kvm_smram_state_64, place, SMRAM_AS_ID)
    return CountedSmi(index, way, bool(area.svm_guest_flag), round(seconds, 4))


def _send(machine: Machine, index: int, way: Way) -> None:
    if way is Way.IOCTL:
        with machine.paused():
            machine.vcpus[index].vcpu.smi()
    else:
        message = kvm_msi(address_lo=_APIC_GPA | index << 12, data=_DELIVERY_SMI)
        machine.vm.call(machine.vm.KVM_SIGNAL_MSI, message)


def _smbase(index: int) -> int:
    return SMRAM_GPA + index * _STRIDE
