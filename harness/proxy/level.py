"""A level under remote control: what L1, its guests and the SMI handler have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final

from harness.errors import Unsupported
from harness.machine.addresses import Gpa
from harness.proxy import program as ops
from harness.proxy.failure import LevelBusy, ProxyError, ProxyFailure, describe, last_operations
from harness.proxy.instance import Instance
from harness.proxy.layout import INSTANCE_SIZE
from harness.proxy.ops import EnterFlag, Op, Policy
from harness.proxy.paging import PageTables
from harness.proxy.program import Fault, Program, Result, flatten
from harness.proxy.vmcb_view import VmcbView
from harness.proxy.vmexit import MissingVmExit, UnexpectedVmExit, VmExit
from harness.svm.msrs import Efer, Msr

if TYPE_CHECKING:
    from harness.proxy.cpu import Cpu
    from harness.proxy.guest_level import GuestLevel

ENTER_DEFAULT: Final = EnterFlag.HOST_STATE | EnterFlag.STGI | EnterFlag.REPORT
"""What a host does around VMRUN, unless `Level.launch` is told otherwise."""


class Level:
    """L1 of a vCPU; base of all other levels."""

    def __init__(
        self,
        cpu: Cpu,
        parent: Level | None,
        tables: PageTables,
        *,
        gpa: Gpa | None = None,
        as_id: int = 0,
        name: str | None = None,
    ) -> None:
        machine = cpu.machine
        self.cpu = cpu
        self.parent = parent
        self.depth: int = 1 if parent is None else parent.depth + 1
        self.tables = tables
        """The level's own page tables; the identity, changed as one likes."""
        self.name = name or f"L{self.depth}"
        if gpa is None:
            gpa = machine.pages.take(INSTANCE_SIZE, INSTANCE_SIZE)
        self.instance = Instance(machine.memory, machine.pages, gpa, self.name, as_id)
        self.instance.set_up(cpu.runner.index, self.depth, tables.root, machine.efer)
        self.context = self.instance.context(machine.entry, tables.root, machine.efer)
        self.started = False
        """It has reported at least once."""
        self.entered: GuestLevel | None = None
        """The guest that it is inside VMRUN for."""
        self.guests: list[GuestLevel] = []
        """The guests that it launched, in order."""
        self._host_state: Gpa | None = None
        cpu.register(self)

    # Running programs

    def start(self, program: Program, *, timeout_s: float | None = None) -> list[Result] | VmExit:
        """Run a program at this level until it is done, or until an exit that nobody handles.

        Whatever has to happen to make this level the current one happens first.

        Raises ProxyError: this level is in the middle of another program (LevelBusy if that cannot
            be resumed), or cannot be reached.
        Raises ProxyFailure: a level crashed, or the wrong one reported.
        Raises GuestStopped: KVM_RUN came back with something else than a report.
        """
        self.make_current(timeout_s)
        self.instance.send(flatten(program))
        return self.go_on(timeout_s)

    def run(self, program: Program, *, timeout_s: float | None = None) -> list[Result]:
        """Run a program and return the results; faults are results too.

        Raises UnexpectedVmExit: this level exited to its host.
        Raises ProxyFailure: see `start`.
        """
        return self._finished(self.start(program, timeout_s=timeout_s))

    def run_to_exit(self, program: Program, *, timeout_s: float | None = None) -> VmExit:
        """Run a program that makes this level exit to its host; return the exit.

        Raises MissingVmExit: it did not.
        Raises ProxyFailure: see `start`.
        """
        return self._exited(self.start(program, timeout_s=timeout_s))

    def do(self, op: Op, *, timeout_s: float | None = None) -> Result:
        """Run one operation."""
        return self.run(op, timeout_s=timeout_s)[0]

    def fault_of(self, op: Op, *, timeout_s: float | None = None) -> Fault | None:
        """Run one operation and return the exception that it raised, or None."""
        return self.do(op, timeout_s=timeout_s).fault

    def go_on(self, timeout_s: float | None = None) -> list[Result] | VmExit:
        """Let this level, the current one or about to be, come to the end of its program."""
        while True:
            seen = self.cpu.advance(self._deadline(timeout_s))
            if isinstance(seen, VmExit):
                return seen
            if seen is not self:
                raise ProxyFailure(f"{seen.name} reported, not {self.name}\n{describe(self.cpu)}")
            if self.instance.idle:
                return self.instance.results()

    def make_current(self, timeout_s: float | None = None) -> None:
        """Bring this level to where it waits for a program.

        A level whose program came to no end stays in the middle of it: after an exit until it is
        resumed, after a failure for good. `GuestLevel.reset` and `GuestLevel.enter` abandon it.

        Raises ProxyError: it is in the middle of one, or cannot be reached.
        """
        while (current := self.cpu.current) is not None and not current.hosts(self):
            current.leave(timeout_s)
        self._enter(timeout_s)
        self._expect_idle()

    def hosts(self, level: Level) -> bool:
        """Tell whether a level is this one or runs inside it."""
        inner: Level | None = level
        while inner is not None and inner is not self:
            inner = inner.parent
        return inner is self

    def leave(self, timeout_s: float | None = None) -> None:
        """Hand over to the host.

        Raises ProxyError: there is none.
        """
        raise ProxyError(f"{self.name} has no host to leave to\n{describe(self.cpu)}")

    def _enter(self, timeout_s: float | None) -> None:
        """Make this level current; one that hosts it is."""
        if self.cpu.current is None:
            self.cpu.wait_report(self._deadline(timeout_s))

    def _expect_idle(self) -> None:
        if not self.instance.idle:
            raise LevelBusy(f"{self.name} is in the middle of a program, {last_operations(self)}")

    def _deadline(self, timeout_s: float | None) -> float:
        return self.cpu.machine.timeout_s if timeout_s is None else timeout_s

    def _finished(self, seen: list[Result] | VmExit) -> list[Result]:
        if isinstance(seen, VmExit):
            raise UnexpectedVmExit(seen)
        return seen

    def _exited(self, seen: list[Result] | VmExit) -> VmExit:
        if isinstance(seen, VmExit):
            return seen
        raise MissingVmExit(self.name, seen)

    # Short forms: one operation each; they raise GuestFault for an exception

    def rdmsr(self, index: int) -> int:
        """RDMSR."""
        return self.do(ops.rdmsr(index)).value

    def wrmsr(self, index: int, value: int) -> None:
        """WRMSR."""
        self._must(ops.wrmsr(index, value))

    def cpuid(self, leaf: int, subleaf: int = 0) -> Mapping[str, int]:
        """CPUID; `rax`, `rbx`, `rcx`, `rdx`."""
        return self.do(ops.cpuid(leaf, subleaf)).regs

    def read(self, gva: int, width: int = 8) -> int:
        """Read memory as this level sees it."""
        return self.do(ops.load(gva, width)).value

    def write(self, gva: int, value: int, width: int = 8) -> None:
        """Write memory as this level sees it."""
        self._must(ops.store(gva, value, width))

    def read_cr(self, number: int) -> int:
        """Return a control register."""
        return self.do(ops.read_cr(number)).value

    def write_cr(self, number: int, value: int) -> None:
        """Write a control register."""
        self._must(ops.write_cr(number, value))

    def exec(self, code: bytes, *, user: bool = False, **registers: int) -> Mapping[str, int]:
        """Execute machine code (without RET) and return the registers."""
        return self.do(self.exec_op(code, user=user, **registers)).regs

    def exec_op(self, code: bytes, *, user: bool = False, **registers: int) -> Op:
        """Return the operation that executes machine code (without RET), for a program."""
        op = ops.exec_at(self.instance.put_code(code + b"\xc3"), **registers)
        return op.user if user else op

    def int_n(self, vector: int) -> Op:
        """Return the operation INT `vector`; let the vector be counted, or it is a fault."""
        return self.exec_op(bytes((0xCD, vector)))

    def ping(self) -> bool:
        """Tell whether this level still does as it is told."""
        return self.do(ops.nop()).ok

    alive = ping

    def _must(self, op: Op) -> None:
        self.do(op).regs  # noqa: B018 - raises GuestFault

    # Interrupts and exceptions

    @property
    def scratch(self) -> int:
        """The address of 24 KiB for scenarios, the same physical and virtual."""
        return self.instance.scratch_gva

    def set_policy(self, vector: int, policy: Policy) -> None:
        """Say what this level's handler of a vector does: fault, count, count and EOI."""
        self.instance.set_policy(vector, policy)

    def counted(self, vector: int) -> int:
        """Return how often this level's handler saw a vector."""
        return self.instance.counted(vector)

    # Hosting guests

    def enable_svm(self) -> None:
        """Set EFER.SVME and VM_HSAVE_PA, unless that was done."""
        if self._host_state is not None:
            return
        pages = self.cpu.machine.pages
        hsave = pages.take()
        efer = Efer(self.rdmsr(Msr.MSR_EFER)).replace(SVME=1)
        results = self.run([ops.wrmsr(Msr.MSR_EFER, efer), ops.wrmsr(Msr.MSR_VM_HSAVE_PA, hsave)])
        for result in results:
            result.regs  # noqa: B018 - raises GuestFault
        self._host_state = pages.take()

    @property
    def uses_svm(self) -> bool:
        """Whether EFER.SVME was set for a guest of this level."""
        return self._host_state is not None

    @property
    def host_state_gpa(self) -> Gpa:
        """A page where this level keeps its own VMLOAD state while a guest runs."""
        if self._host_state is None:
            raise ProxyError(f"{self.name} has launched no guest")
        return self._host_state

    def launch(
        self,
        *,
        vmcb: Mapping[str, int] | None = None,
        npt: bool | None = None,
        msrpm: Iterable[int] = (),
        iopm: Iterable[int] = (),
        name: str | None = None,
        enter_flags: EnterFlag = ENTER_DEFAULT,
    ) -> GuestLevel:
        """Prepare a guest with a proxy in it; its first program makes it run.

        Args:
            vmcb: fields to change, by the names of `VmcbView`: `{"intercept.cpuid": 1}`.
            npt: nested paging, with tables of its own (`guest.npt`); else shadow paging. By default
                nested paging where KVM offers it.
            msrpm: MSRs to intercept, both ways; more through `guest.msrpm`.
            iopm: ports to intercept; more through `guest.iopm`.
            name: for messages; L2, L3, ... by default.
            enter_flags: what this level does around VMRUN.

        Raises GuestFault: EFER.SVME is refused.
        Raises Unsupported: nested paging is asked for, and KVM offers none.

        """
        self.enable_svm()
        offered = self.cpu.machine.offers_npt
        if npt is None:
            npt = offered
        elif npt and not offered:
            # __nested_vmcb_check_controls() refuses NP_ENABLE then: VMRUN would be VMEXIT_INVALID.
            raise Unsupported("nested paging: KVM_GET_SUPPORTED_CPUID: 8000000A EDX[0] NPT=0")
        guest = self.cpu.make_guest(self, npt=npt, name=name, enter_flags=enter_flags)
        for index in msrpm:
            guest.intercept_msr(index)
        for port in iopm:
            guest.intercept_port(port)
        guest.vmcb.update(vmcb or {})
        self.guests.append(guest)
        return guest

    def machine_address(self, pa: int) -> int | None:
        """Return where a physical address of this level lies in memory; None: nowhere."""
        return pa

    def submit_entry(self, guest: GuestLevel) -> None:
        """Put the VMRUN of a guest into the mailbox; the next run executes it."""
        self.instance.send([guest.entry_op()])
        self.entered = guest

    @property
    def vmcb_or_none(self) -> VmcbView | None:
        """The VMCB that this level runs from, if its host is a proxy."""
        return None
