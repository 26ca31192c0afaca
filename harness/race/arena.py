"""The machine that a race is run in: one vCPU at VMRUN, and a writer beside it."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from collections.abc import Iterator
from dataclasses import replace
from enum import Enum
from typing import Any, Final

from harness.errors import HarnessError, HostError
from harness.machine.addresses import Gpa
from harness.machine.cpuid import CpuidPolicy
from harness.proxy.cpu import Cpu
from harness.proxy.machine import ProxyMachine
from harness.proxy.program import exec_at
from harness.proxy.vmcb_view import VmcbView, place_of
from harness.race.attempt import Attempt, Plan, attempts_of, field_of
from harness.race.code import L2, LOOP, RECORD_SIZE, WRITER, machine_code, race_control
from harness.race.events import VmrunEvents
from harness.race.fields import ASID_0_SEEN, ASID_SEEN, RacedField
from harness.svm.cpuid import Leaf
from harness.svm.vmcb import VMCB_SIZE
from kvm_ioctl.asm_kvm import NestedStateFlags, kvm_cpuid_entry2
from kvm_ioctl.handles import Kvm

CHUNK: Final = 128
"""Attempts between two looks at them."""

CHUNK_S: Final = 120.0
"""So long a chunk may take; on CPUs of its own it takes a fraction of a second."""

_MEMORY_MIB = 16
_WORD = 8
_JOIN_S = 10.0
_SEED = 0x9E37_79B9_7F4A_7C15
_FSGSBASE = 1
"""CPUID 0000_0007 EBX."""


class By(Enum):
    """Who rewrites vmcb12."""

    VCPU = "vcpu"
    HOST = "host"


class Arena:
    """A machine set up for one field; use it in a `with`."""

    def __init__(self, kvm: Kvm, row: RacedField, by: By) -> None:
        self.row = row
        self.by = by
        self._stack = contextlib.ExitStack()
        self._machine = self._stack.enter_context(
            ProxyMachine(
                kvm,
                vcpus=2,
                memory_mib=_MEMORY_MIB,
                cpuid=CpuidPolicy(edit=_hide_fsgsbase),
                timeout_s=CHUNK_S,
            )
        )
        try:
            self._set_up()
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _set_up(self) -> None:
        machine, pages = self._machine, self._machine.pages
        l1 = machine.cpus[0].l1
        self._l2 = l1.launch()
        self._control = pages.take()
        self._vmcb = VmcbView(machine.memory, pages.take())
        self._templates = pages.take(2 * VMCB_SIZE)
        self._records = pages.take(CHUNK * RECORD_SIZE)
        self._loop = l1.instance.put_code(machine_code(LOOP))
        self._writer = machine.cpus[1].l1.instance.put_code(machine_code(WRITER))
        self._l2.vmcb["rip"] = l1.instance.put_code(self.row.look + machine_code(L2))
        # Whatever saves L2's state changes this: bit 1 is always 1 in a CPU.
        self._l2.vmcb["rflags"] = 0
        self._l2.vmcb["intercept.hlt"] = 1
        self.plan = self._make_plan()
        for cpu in machine.cpus:
            cpu.l1.ping()
        if self.row.loud:
            machine.cpus[0].before_run = self._look
        self._events = self._stack.enter_context(VmrunEvents()) if self.row.traced else None

    def _make_plan(self) -> Plan:
        view = self._l2.vmcb
        even = view.bytes()
        offset = place_of(next(iter(self.row.illegal))).offset // _WORD * _WORD
        view.update({name: change(view[name]) for name, change in self.row.illegal.items()})
        spoilt = view.bytes()
        self._machine.memory.write(view.gpa, even)
        view.update(self.row.odd)
        odd = view.bytes()
        legal, illegal = (_word(image, offset) for image in (even, spoilt))
        outside = [n for n in range(0, VMCB_SIZE, _WORD) if _word(even, n) != _word(spoilt, n)]
        if outside != [offset]:
            raise HarnessError(f"{self.row.name}: the illegal value is not in one word of the VMCB")
        return Plan(offset, legal, illegal, (even, odd), (illegal, legal), self.row.hidden)

    # Running

    @contextlib.contextmanager
    def racing(self, plan: Plan) -> Iterator[None]:
        """Have a writer for the time of the `with`, in which `attempts` may be called."""
        self._write_control(plan)
        run = self._vcpu_writes if self.by is By.VCPU else self._host_writes
        with run():
            yield

    def attempts(self, plan: Plan, count: int = CHUNK) -> list[Attempt]:
        """Execute VMRUN so many times, at most `CHUNK`; return what came of each.

        Raises HostError: the writer stands still.
        Raises ProxyFailure: the machine stopped.
        """
        self._set("attempts", count)
        l1 = self._machine.cpus[0].l1
        left = l1.do(exec_at(self._loop, rdi=self._control), timeout_s=CHUNK_S).regs["rax"]
        if left:
            raise HostError(
                f"{self.row.name}: the writer stood still with {left} of {count} attempts to go"
            )
        records = self._machine.memory.read(self._records, count * RECORD_SIZE)
        attempts = attempts_of(plan, records)
        if self._events is None:
            return attempts
        return [
            replace(attempt, traced_rip=rip)
            for attempt, rip in zip(attempts, self._events.take(count), strict=True)
        ]

    def _write_control(self, plan: Plan) -> None:
        memory = self._machine.memory
        place = self._vmcb.gpa + plan.offset
        control = race_control(
            random=_SEED,
            place=place if self.by is By.VCPU else self._hva(Gpa(place)),
            illegal=plan.writes[0],
            legal=plan.writes[1],
            vmcb=self._vmcb.gpa,
            templates=self._templates,
            records=self._records,
        )
        control.probe_offset, control.probe_mask = self._probe(plan)
        memory.write_struct(self._control, control)
        memory.write(self._templates, b"".join(plan.templates))

    def _probe(self, plan: Plan) -> tuple[int, int]:
        """Return the word that differs from the template unless the write came too late."""
        if not self.row.probe:
            # #VMEXIT writes the save area back; of the control area L2's exit code tells.
            in_save_area = plan.offset >= place_of("save.es.selector").offset
            return plan.offset, plan.mask if in_save_area else 0
        place = place_of(self.row.probe)
        even, odd = (field_of(template, self.row.probe) for template in plan.templates)
        shift = place.offset % _WORD * 8
        return place.offset // _WORD * _WORD, (even ^ odd or place.mask) << shift

    @contextlib.contextmanager
    def _vcpu_writes(self) -> Iterator[None]:
        level = self._machine.cpus[1].l1
        op = exec_at(self._writer, rdi=self._control)
        thread = self._machine.in_thread(level, lambda l1: l1.do(op, timeout_s=_FOR_EVER_S))
        try:
            yield
        finally:
            self._set("stop", 1)
            thread.join(_JOIN_S)

    @contextlib.contextmanager
    def _host_writes(self) -> Iterator[None]:
        code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        code.write(machine_code(WRITER))
        entry = ctypes.addressof(ctypes.c_char.from_buffer(code))
        function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(entry)
        # The call gives the GIL back for as long as it runs.
        thread = threading.Thread(target=function, args=(self._hva(self._control),), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._set("stop", 1)
            thread.join(_JOIN_S)
            if thread.is_alive():
                raise HarnessError("the host's writer does not stop")

    def _look(self, cpu: Cpu) -> None:
        """Tell L2 what KVM has cached of its ASID; called between two runs of the vCPU."""
        cpu.port_writes.clear()
        state = cpu.runner.vcpu.get_nested_state()
        if not state.flags & NestedStateFlags.KVM_STATE_NESTED_GUEST_MODE:
            return
        asid = field_of(bytes(state.data), "asid")
        self._set("seen", ASID_SEEN if asid else ASID_0_SEEN)

    # The page that all share

    def _set(self, name: str, value: int) -> None:
        place: Any = getattr(race_control, name)
        self._machine.memory.write_int(Gpa(self._control + place.offset), place.size, value)

    def _hva(self, gpa: Gpa) -> int:
        slots = self._machine.memory.slots()
        return next(int(slot.hva) + gpa - slot.gpa for slot in slots if slot.gpa <= gpa < slot.end)


_FOR_EVER_S = 3600.0
"""Of the writer, which ends when it is told to."""


def _word(image: bytes, offset: int) -> int:
    return int.from_bytes(image[offset : offset + _WORD], "little")


def unraced(plan: Plan, value: int) -> Plan:
    """Return a plan by which vmcb12 has one value all the time."""
    place = slice(plan.offset, plan.offset + _WORD)

    def fixed(template: bytes) -> bytes:
        image = bytearray(template)
        image[place] = value.to_bytes(_WORD, "little")
        return bytes(image)

    even, odd = plan.templates
    return replace(plan, templates=(fixed(even), fixed(odd)), writes=(value, value))


def _hide_fsgsbase(entries: list[kvm_cpuid_entry2]) -> None:
    for entry in entries:
        if entry.function == Leaf.STRUCTURED_FEATURES and entry.index == 0:
            entry.ebx &= ~_FSGSBASE
