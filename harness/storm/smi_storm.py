"""A storm of SMIs: one machine at work gets them at random times, beside a twin that gets none.

One thread lets the machine work, step by step; another sends it SMIs, one after the other, at times
and in ways that a seed decides. Then the twin does the same steps in peace, and what they gave,
memory and state are compared. Every SMI is waited for until its handler is entered: each must be
taken, and once.
"""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Final

from harness.errors import ScenarioFailure
from harness.machine.threads import VcpuThread
from harness.migrate.difference import EXCUSED, state_differences
from harness.migrate.state import capture
from harness.proxy.apic import Apic, Delivery
from harness.proxy.layout import INSTANCE_SIZE
from harness.proxy.machine import FREE_GPA, ProxyMachine
from harness.proxy.ops import Op
from harness.proxy.program import outb
from harness.proxy.smm import SMI_COMMAND_PORT, SmmLevel
from harness.storm.bounce import Emit, distribution
from harness.storm.smi import (
    COUNTS,
    Smi,
    interrupted_level,
    levels_hit,
    memory_outside_smm,
    read_smi,
    send_message,
    set_mce,
)
from harness.storm.workload import MEMORY_MIB, TIMEOUT_S, Kind, Workload
from harness.svm.msrs import Cr0, Efer, Msr
from harness.svm.smram import SMRAM_GPRS
from kvm_ioctl.handles import Kvm

SILENCE_S: Final = 60.0
"""So long an SMI may take to be handled."""

_SHOWN: Final = 8
_LONGEST_PEACE_S: Final = 0.02
_POLL_S: Final = 0.0005
_END_S: Final = 120.0
_NOBODY: Final = 0xFE
"""An APIC ID that no vCPU has."""
_RFLAGS_ONE: Final = 1 << 1
_TOLD_EVERY: Final = 10

IOCTL, MESSAGE, PORT, ICR = "KVM_SMI", "KVM_SIGNAL_MSI", "port B2h", "ICR"
SOURCES: Final = (IOCTL, IOCTL, MESSAGE, MESSAGE, MESSAGE, PORT, ICR)
"""Ways to send an SMI, as often as they are wanted; the last two are the guest's."""

EXCUSED_ICR: Final = {r"vcpu\d+\.lapic\.0x3[01]0": "the twin's IPI is for nobody"}


@dataclass(frozen=True)
class SmiPlan:
    """What a storm of SMIs is like."""

    smis: int
    kind: Kind = field(default_factory=Kind)
    seed: int = 0
    save_area: bool = False
    """Compare each save area with what was interrupted."""

    @property
    def machine_options(self) -> dict[str, Any]:
        """Of the machine, see `ProxyMachine`."""
        return {"memory_mib": MEMORY_MIB, "timeout_s": TIMEOUT_S, "smm": True, "irqchip": True}


def smi_storm(emit: Emit, kvm: Kvm, plan: SmiPlan) -> dict[str, Any]:
    """Let the storm blow; return what it did.

    Raises ScenarioFailure: a guest did what it must not, or an SMI was not taken.
    """
    started = time.monotonic()
    with ProxyMachine(kvm, **plan.machine_options) as machine:
        storm = _Storm(emit, plan, machine)
        storm.blow()
        with ProxyMachine(kvm, **plan.machine_options) as twin:
            storm.compare(twin)
    return {**storm.report(), "seconds": round(time.monotonic() - started, 3)}


class _Worker:
    """A workload whose steps may begin with an SMI of the guest's own."""

    def __init__(self, machine: ProxyMachine, kind: Kind, *, calm: bool) -> None:
        set_mce(machine.l1)
        # Until a vCPU writes to its APIC, KVM's map of APIC IDs does not have it.
        Apic(machine.l1).enable()
        self.workload = Workload.begin(machine, kind)
        self._calm = calm
        for cpu in machine.cpus:
            cpu.answers_smi_port = not calm

    def step(self, source: str | None) -> str:
        """Run one step, after the guest's SMI if it is to send one; return its entry."""
        if source is not None:
            self.workload.level.run(self._operations(source))
        return self.workload.step()

    def _operations(self, source: str) -> list[Op]:
        if source == PORT:
            return [outb(SMI_COMMAND_PORT, 1)]
        return Apic(self.workload.level).ipi(_NOBODY if self._calm else 0, 0, Delivery.SMI)


class _Storm:
    """The machine in the storm, and what was seen of it."""

    def __init__(self, emit: Emit, plan: SmiPlan, machine: ProxyMachine) -> None:
        self.divergences: list[str] = []
        self.implausible: list[str] = []
        self._emit = emit
        self._plan = plan
        self._machine = machine
        self._random = random.Random(plan.seed)
        self._worker = _Worker(machine, plan.kind, calm=False)
        self._steps: list[tuple[str | None, str]] = []
        self._asked: str | None = None
        self._over = threading.Event()
        self._sent = 0.0
        self._smis: list[Smi] = []
        self._latencies: list[float] = []
        self._sources: dict[str, int] = {}

    # The machine's thread

    def _work(self) -> None:
        while not self._over.is_set():
            source, self._asked = self._asked, None
            if source is not None:
                self._sent = time.monotonic()
            self._steps.append((source, self._worker.step(source)))

    def _handle(self, handler: SmmLevel) -> None:
        now = time.monotonic()
        smi = read_smi(handler)
        if self._plan.save_area:
            wrong = wrong_in_save_area(handler)
            self.implausible += [f"SMI {len(self._smis)} in {smi.level or '?'}: {w}" for w in wrong]
        self._latencies.append(now - self._sent)
        # Last: whoever waits for it sends the next one.
        self._smis.append(smi)

    # The other one

    def blow(self) -> None:
        """Send all SMIs and let the machine come to the end of its step.

        Raises ScenarioFailure: an SMI was not handled, or a step failed.
        """
        self._machine.smm.handler = self._handle
        thread = self._machine.in_thread(self._worker.workload.level, lambda _: self._work())
        try:
            for number in range(1, self._plan.smis + 1):
                self._send(self._random.choice(SOURCES))
                self._await(number, thread)
                if number % _TOLD_EVERY == 0 or number == self._plan.smis:
                    self._emit("smi", number=number, of=self._plan.smis)
        finally:
            self._over.set()
        thread.join(_END_S)

    def _send(self, source: str) -> None:
        time.sleep(self._random.uniform(0, _LONGEST_PEACE_S))
        self._sources[source] = self._sources.get(source, 0) + 1
        self._sent = time.monotonic()
        if source == MESSAGE:
            send_message(self._machine, Delivery.SMI)
        elif source == IOCTL:
            # A vCPU's ioctls wait until it is out of KVM_RUN; so it is got out, wherever it is.
            with self._machine.paused():
                self._machine.vcpus[0].vcpu.smi()
        else:
            self._asked = source

    def _await(self, number: int, thread: VcpuThread[None]) -> None:
        deadline = time.monotonic() + SILENCE_S
        while len(self._smis) < number:
            if not thread.running:
                # What ended it is why there is no SMI.
                thread.join(_END_S)
                raise ScenarioFailure(f"storm: the machine stopped before SMI {number}")
            if time.monotonic() > deadline:
                raise ScenarioFailure(f"storm: SMI {number} was not handled in {SILENCE_S:g} s")
            time.sleep(_POLL_S)

    # Afterwards

    def compare(self, twin: ProxyMachine) -> None:
        """Let a twin do the same in peace, and note where the two are not the same."""
        calm = _Worker(twin, self._plan.kind, calm=True)
        for number, (source, entry) in enumerate(self._steps):
            if (expected := calm.step(source)) != entry:
                self._diverged(f"step {number} gave {entry!r}, the twin's {expected!r}")
        for machine in (twin, self._machine):
            machine.l1.ping()
        hsave = twin.vcpus[0].vcpu.get_msrs([Msr.MSR_VM_HSAVE_PA])[Msr.MSR_VM_HSAVE_PA]
        excused = (*EXCUSED, *COUNTS, *EXCUSED_ICR)
        found = [
            *memory_outside_smm(twin, self._machine, hsave),
            *state_differences(capture(twin), capture(self._machine), excused),
        ]
        if found:
            self._diverged("at the end, " + "; ".join(map(str, found[:_SHOWN])))
        counted = self._machine.vcpus[0].vcpu.get_msrs([Msr.MSR_SMI_COUNT])[Msr.MSR_SMI_COUNT]
        if counted != len(self._smis) or counted != self._plan.smis:
            handled = f"the handler was entered {len(self._smis)} times"
            self._diverged(f"{self._plan.smis} SMIs were sent, {handled}, MSR_SMI_COUNT={counted}")

    def _diverged(self, how: str) -> None:
        self.divergences.append(how)
        self._emit("diverged", how=how)

    def report(self) -> dict[str, Any]:
        """Return the storm in numbers."""
        kind = self._plan.kind
        return {
            "smis": len(self._smis),
            "levels": kind.levels,
            "nested_paging": kind.npt,
            "seed": self._plan.seed,
            "steps": len(self._steps),
            "hit": levels_hit(self._smis),
            "sources": dict(sorted(self._sources.items())),
            "divergences": len(self.divergences),
            "first_divergences": self.divergences[:_SHOWN],
            "save_areas_checked": len(self._smis) if self._plan.save_area else 0,
            "implausible_save_areas": len(self.implausible),
            "first_implausible": self.implausible[:_SHOWN],
            "latency_s": distribution(self._latencies),
        }


def wrong_in_save_area(handler: SmmLevel) -> list[str]:
    """Return what in the save area cannot be of the level whose CR3 it has; nothing: all is well.

    Proxies run with paging, from their image or their instance, on their instance's stacks.
    """
    area, level = handler.save_area, interrupted_level(handler)
    if level is None:
        return [f"CR3 {area.cr3:#x} is no level's"]
    own = range(level.instance.gpa, level.instance.gpa + INSTANCE_SIZE)
    rsp = area.gprs[SMRAM_GPRS.index("rsp")]
    efer = Efer(area.efer)
    claims = {
        f"SVM guest flag {area.svm_guest_flag}": area.svm_guest_flag == int(level.depth > 1),
        f"EFER {efer}": bool(efer.LMA) and bool(efer.SVME) >= (level.depth > 1),
        f"CR0 {area.cr0:#x}": bool(Cr0(area.cr0).PG),
        f"RIP {area.rip:#x}": area.rip in own or area.rip < FREE_GPA,
        # Of an empty stack it is the first address beyond.
        f"RSP {rsp:#x}": rsp - 1 in own,
        f"RFLAGS {area.rflags:#x}": bool(area.rflags & _RFLAGS_ONE),
        f"SMBASE {area.smbase:#x}": area.smbase == handler.smbase,
        f"vmcb12 {area.svm_guest_vmcb_gpa:#x}": (area.svm_guest_vmcb_gpa != 0) == (level.depth > 1),
    }
    return [what for what, holds in claims.items() if not holds]
