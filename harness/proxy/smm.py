"""The SMI handler: a proxy in SMRAM."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from harness.machine.addresses import Gpa
from harness.machine.memory import SMRAM_AS_ID
from harness.proxy.failure import ProxyError, ProxyFailure, describe
from harness.proxy.layout import INSTANCE_SIZE, SMM_ENTRY, TABLES_OFFSET
from harness.proxy.level import Level
from harness.proxy.program import simple
from harness.svm.msrs import Msr
from harness.svm.smram import (
    DEFAULT_SMBASE,
    SMM_REVISION_64,
    SMRAM_STATE_OFFSET,
    kvm_smram_state_32,
    kvm_smram_state_64,
)

if TYPE_CHECKING:
    from harness.proxy.cpu import Cpu

SMI_COMMAND_PORT: Final = 0xB2
"""A write here raises an SMI, as on a PC's chipset."""

_REVISION_OFFSET = 0xFEFC


class SmmLevel(Level):
    """The proxy that an SMI enters; until then none of its methods makes sense."""

    def __init__(self, cpu: Cpu) -> None:
        self.smbase = DEFAULT_SMBASE + cpu.runner.index * INSTANCE_SIZE
        machine = cpu.machine
        super().__init__(
            cpu,
            None,
            machine.page_tables(),
            gpa=Gpa(self.smbase),
            as_id=SMRAM_AS_ID,
            name="SMM",
        )
        self.interrupted: Level | None = None
        """The level that was current when the SMI came."""
        self.handler: Callable[[SmmLevel], None] | None = None
        """What is done for an SMI that comes while a program runs; RSM follows."""
        self._write_entry()
        if self.smbase != DEFAULT_SMBASE:
            cpu.runner.vcpu.set_msrs({Msr.MSR_IA32_SMBASE: self.smbase})

    @property
    def active(self) -> bool:
        """Whether the vCPU is in SMM now."""
        return self.cpu.current is self

    @property
    def is_64_bit(self) -> bool:
        """Whether the save area has the 64-bit layout, by its revision."""
        return self.read_smram(_REVISION_OFFSET, 4) == SMM_REVISION_64

    @property
    def save_area(self) -> kvm_smram_state_64:
        """A copy of the state save area, 64-bit layout."""
        return self.cpu.machine.memory.read_struct(kvm_smram_state_64, self._state_gpa, SMRAM_AS_ID)

    def write_save_area(self, state: kvm_smram_state_64 | kvm_smram_state_32) -> None:
        """Replace the state save area; RSM loads it."""
        self.cpu.machine.memory.write_struct(self._state_gpa, state, SMRAM_AS_ID)

    @property
    def save_area_32(self) -> kvm_smram_state_32:
        """A copy of the state save area, legacy layout."""
        return self.cpu.machine.memory.read_struct(kvm_smram_state_32, self._state_gpa, SMRAM_AS_ID)

    def read_smram(self, offset: int, size_bytes: int) -> int:
        """Return a number from SMRAM, by its offset from SMBASE."""
        return self.cpu.machine.memory.read_int(Gpa(self.smbase + offset), size_bytes, SMRAM_AS_ID)

    def rsm(self) -> Level:
        """Leave SMM and return the level that goes on; it waits for a program again.

        Raises GuestFault: RSM raised an exception.
        Raises GuestStopped: RSM ended the guest.
        """
        if not self.active:
            raise ProxyError(f"the vCPU is not in SMM\n{describe(self.cpu)}")
        self.instance.send([simple("RSM")])
        level, _ = self.cpu.wait_report(self.cpu.machine.timeout_s)
        if level is self:
            for result in self.instance.results():
                result.regs  # noqa: B018 - raises GuestFault
            raise ProxyFailure(f"RSM did nothing\n{describe(self.cpu)}")
        return level

    def answer(self) -> None:
        """Let `handler` deal with an SMI that came by itself, then put an RSM in the mailbox."""
        if self.handler is not None:
            self.handler(self)
        if self.active:
            self.instance.send([simple("RSM")])

    def make_current(self, timeout_s: float | None = None) -> None:
        """Check that the vCPU is in SMM: only an SMI brings it there.

        Raises ProxyError: it is not, or the handler is in the middle of a program.
        """
        if not self.active:
            raise ProxyError(f"the vCPU is not in SMM: inject_smi() first\n{describe(self.cpu)}")
        self._expect_idle()

    @property
    def _state_gpa(self) -> Gpa:
        return Gpa(self.smbase + SMRAM_STATE_OFFSET)

    def _write_entry(self) -> None:
        """Copy the start code to where the SMI enters, and fill in its addresses."""
        machine = self.cpu.machine
        symbol = machine.proxy_image.symbol
        start, end = symbol("smm_start"), symbol("smm_end")
        code = bytearray(machine.memory.read(start, end - start))
        entry = self.smbase + SMM_ENTRY
        for name, value in {
            "smm_far_offset": entry + symbol("smm_long_mode") - start,
            "smm_gdt_base": self.smbase + TABLES_OFFSET,
            "smm_base": self.smbase,
        }.items():
            struct.pack_into("<I", code, symbol(name) - start, value)
        machine.memory.write(Gpa(entry), bytes(code), SMRAM_AS_ID)
