"""A small VM that runs one vmcb12 after the other, and one vCPU that is given them as its state.

L1 is a loop of VMLOAD, VMRUN, VMSAVE, a write to a port and STGI; the host writes vmcb12 while L1
stands at the port.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Self

from harness.crosscheck.silicon import cpu_facts
from harness.errors import ScenarioFailure
from harness.fields.rows import EARLY, ENTERED, LATE, STOPPED, TAKEN
from harness.fields.template import (
    ADDRESS_BITS,
    MEMORY_MIB,
    Layout,
    image,
    place,
    template,
)
from harness.machine.addresses import Gpa
from harness.machine.console import PortOut
from harness.machine.cpuid import CpuidPolicy
from harness.machine.entry import entry_sregs
from harness.machine.loader import EntryMode
from harness.machine.machine import Machine
from harness.machine.memory import GuestMemory
from harness.machine.vcpu import MachineVcpu, event_text
from harness.model.facts import CpuFacts
from harness.proxy.paging import PAGE, PageAllocator, PageTables
from harness.svm.exit_codes import VMEXIT_INVALID, describe
from harness.svm.msrs import Efer, Msr
from harness.svm.vmcb import IOPM_SIZE, MSRPM_SIZE, VMCB_SIZE
from kvm_ioctl.asm_kvm import NestedStateFlags, kvm_nested_state, kvm_regs
from kvm_ioctl.handles import Kvm
from kvm_ioctl.request import KvmError

_FREE: Final = Gpa(0x1_0000)
_PORT: Final = 0x80
_DEADLINE_S: Final = 5.0
_L1_CODE: Final = bytes.fromhex("0f01da 0f01d8 0f01db e680 0f01dc ebf0")
_VMMCALL: Final = bytes.fromhex("0f01d9")
_HLT: Final = b"\xf4"
_LOW_HALF = 0xFFFF_FFFF
_FORMAT_SVM = 1
_DEBUG_REGISTERS = ("save.dr6", "save.dr7")


@dataclass(frozen=True)
class Seen:
    """What VMRUN of a cell came to."""

    what: str
    """ENTERED, EARLY, LATE or STOPPED."""
    how: str
    """The exit code in words, or how KVM_RUN ended."""
    late_is_told: bool = True
    """This kernel lets EARLY and LATE be told apart; else both are EARLY here."""


class Vehicle:
    """The VM; of no more use after a cell was STOPPED. Use it in a `with`."""

    def __init__(self, kvm: Kvm) -> None:
        """Build it; L1 stands before its loop.

        Raises KvmError: KVM refused something: EFER.SVME for example.
        """
        policy = CpuidPolicy(physical_address_bits=ADDRESS_BITS)
        self._machine = Machine(kvm, vcpus=2, memory_mib=MEMORY_MIB, cpuid=policy)
        try:
            self.memory = self._machine.memory
            entries = policy.entries(kvm.supported_cpuid(), 0, 2)
            self.facts: CpuFacts = cpu_facts(entries)
            pages = PageAllocator(_FREE, Gpa(MEMORY_MIB << 20))
            self._vmcb12 = pages.take()
            self.layout = self._lay_out(pages)
            self.template: dict[str, int] = template(self.layout)
            self._l1, self._restored = self._machine.vcpus
            self._start(pages)
            self._late_by = self._calibrate()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Destroy the VM."""
        self._machine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fields(self, changes: Mapping[str, int]) -> dict[str, int]:
        """Return the fields of the template with some changed."""
        return {**self.template, **changes}

    def vmrun(self, fields: Mapping[str, int]) -> Seen:
        """Let L1 execute VMRUN of a vmcb12 with these fields."""
        self.memory.write(self._vmcb12, image(fields))
        try:
            event = self._l1.run(_DEADLINE_S)
        except (ScenarioFailure, KvmError) as e:
            return Seen(STOPPED, f"{self._where()}: {str(e).splitlines()[0]}")
        if not isinstance(event, PortOut) or event.port != _PORT:
            return Seen(STOPPED, f"{self._where()}: {event_text(event)}")
        return self._judged(fields)

    def set_nested_state(self, fields: Mapping[str, int]) -> str:
        """Give these fields to KVM_SET_NESTED_STATE, as control area of vmcb12 and as L1's save.

        Returns TAKEN, or the errno's name.
        """
        vcpu = self._restored.vcpu
        flags = NestedStateFlags.KVM_STATE_NESTED_GUEST_MODE | _GIF
        blob = bytearray(self._header(flags, 128 + VMCB_SIZE)) + image(fields)
        error = vcpu.try_call(vcpu.KVM_SET_NESTED_STATE, kvm_nested_state.over(blob))
        if error:
            return errno.errorcode.get(error, f"errno {error}")
        # Back out of guest mode, for the next one.
        leave = kvm_nested_state.over(bytearray(self._header(_GIF, 128)))
        vcpu.call(vcpu.KVM_SET_NESTED_STATE, leave)
        return TAKEN

    def pdptes(self, fields: Mapping[str, int]) -> tuple[int, ...]:
        """Return the four PDPTEs where CR3 points, () if there is no memory."""
        at = fields.get("save.cr3", 0) & 0xFFFF_FFE0
        if at + 32 > MEMORY_MIB << 20:
            return ()
        return tuple(self.memory.read_int(Gpa(at + 8 * i), 8) for i in range(4))

    def has_memory(self, gpa: int, size_bytes: int) -> bool:
        """Tell whether all of a range is memory."""
        return gpa + size_bytes <= MEMORY_MIB << 20

    # Inside

    def _judged(self, fields: Mapping[str, int]) -> Seen:
        code = self._read("control.exit_code")
        if code & _LOW_HALF != VMEXIT_INVALID & _LOW_HALF:
            return Seen(ENTERED, describe(code))
        late = self._late_by(fields)
        return Seen(LATE if late else EARLY, describe(code), late is not None)

    def _calibrate(self) -> Callable[[Mapping[str, int]], bool | None]:
        """Run the template, and what must be refused early; return what tells LATE by."""
        self._late_by = _cannot_tell
        seen = self.vmrun(self.template)
        if seen.what != ENTERED:
            raise ScenarioFailure(f"the template of all cells: {seen.what}, {seen.how}")
        if self._wrote_back(self.template):
            return self._wrote_back
        self.vmrun(self.fields({"control.asid": 0}))
        return _cannot_tell if self._gif_is_0(self.template) else self._gif_is_0

    def _wrote_back(self, fields: Mapping[str, int]) -> bool:
        """Tell whether L2's DR6 or DR7 came back, with their bits that are fixed to 1."""
        return any(self._read(name) != fields.get(name, 0) for name in _DEBUG_REGISTERS)

    def _gif_is_0(self, fields: Mapping[str, int]) -> bool:
        """Tell whether there was a #VMEXIT, on kernels that refuse without one."""
        return not self._l1.vcpu.get_nested_state().flags & _GIF

    def _read(self, name: str) -> int:
        at, size = place(name)
        return self.memory.read_int(Gpa(self._vmcb12 + at), size)

    def _where(self) -> str:
        flags = self._l1.vcpu.get_nested_state().flags
        return "in L2" if flags & NestedStateFlags.KVM_STATE_NESTED_GUEST_MODE else "in L1"

    def _header(self, flags: int, size: int) -> bytes:
        header = kvm_nested_state(flags=flags, format=_FORMAT_SVM, size=size)
        header.hdr.svm.vmcb_pa = self._vmcb12
        return bytes(header)

    def _lay_out(self, pages: PageAllocator) -> Layout:
        code = pages.take()
        self.memory.write(code, _VMMCALL.ljust(PAGE, _HLT))
        own, nested = PageTables(self.memory, pages), PageTables(self.memory, pages)
        own.map(code, code)
        for page in (code, *_tables_of(self.memory, own.root, code)):
            nested.map(page, page)
        return Layout(code, own.root, nested.root, pages.take(MSRPM_SIZE), pages.take(IOPM_SIZE))

    def _start(self, pages: PageAllocator) -> None:
        tables = PageTables(self.memory, pages)
        tables.identity(0, MEMORY_MIB << 20)
        code, hsave = pages.take(), pages.take()
        self.memory.write(code, _L1_CODE)
        for runner in (self._l1, self._restored):
            _enter_long_mode(runner, tables.root, hsave)
        regs = kvm_regs(rip=code, rflags=2, rax=self._vmcb12)
        self._l1.vcpu.set_regs(regs)


def _cannot_tell(fields: Mapping[str, int]) -> None:
    return None


def _tables_of(memory: GuestMemory, root: int, address: int) -> Iterator[int]:
    """Yield the four tables that a walk to an address reads."""
    table = root
    yield table
    for shift in (39, 30, 21):
        entry = memory.read_int(Gpa(table + 8 * (address >> shift & 0x1FF)), 8)
        table = entry & -PAGE & (1 << ADDRESS_BITS) - 1
        yield table


def _enter_long_mode(runner: MachineVcpu, cr3: int, hsave: int) -> None:
    vcpu = runner.vcpu
    sregs = entry_sregs(vcpu.get_sregs(), EntryMode.LONG64)
    sregs.cr3 = cr3
    sregs.efer = Efer(sregs.efer).replace(SVME=1)
    vcpu.set_sregs(sregs)
    vcpu.set_msrs({Msr.MSR_VM_HSAVE_PA: hsave})


_GIF: Final = NestedStateFlags.KVM_STATE_NESTED_GIF_SET
