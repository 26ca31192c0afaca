"""A level inside a VMCB: a guest of L1, or a guest of such a guest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from harness.machine.addresses import Gpa
from harness.proxy import program as ops
from harness.proxy.failure import ProxyError, ProxyFailure, describe
from harness.proxy.instance import GDT_LIMIT, IDT_LIMIT, TSS_LIMIT
from harness.proxy.layout import GDT_CS64, GDT_DS, GDT_TSS, VMCB_REGISTERS, proxy_gprs
from harness.proxy.level import Level
from harness.proxy.nesting import Nesting
from harness.proxy.ops import EnterFlag, Op
from harness.proxy.paging import PageTables, translate
from harness.proxy.permissions import Iopm, Msrpm
from harness.proxy.program import Result
from harness.proxy.vmcb_view import VmcbView
from harness.proxy.vmexit import MissingVmExit, UnexpectedVmExit, VmExit
from harness.svm.exit_codes import ExitCode
from harness.svm.intercepts import Intercept
from harness.svm.msrs import Efer
from harness.svm.vmcb import IOPM_SIZE, MSRPM_SIZE, NestedCtl, SegAttrib, vmcb, vmcb_seg

LEAVE_MAGIC: Final = 0x4C45_4156
"""RAX of the VMMCALL by which a level hands over to its host when Python wants the host."""

VMMCALL_LENGTH: Final = 3
PAT_DEFAULT: Final = 0x0007_0406_0007_0406
DR6_DEFAULT: Final = 0xFFFF_0FF0
DR7_DEFAULT: Final = 0x400

_PRESENT = SegAttrib.of(P=1, S=1)
CODE64_ATTRIB: Final = _PRESENT.replace(G=1, L=1, TYPE=0xB)
DATA_ATTRIB: Final = _PRESENT.replace(G=1, DB=1, TYPE=0x3)
TSS_ATTRIB: Final = SegAttrib.of(P=1, TYPE=0xB)

ExitHook = Callable[[VmExit], bool]
"""Looks at an exit; True: it is handled, run the guest on."""


class GuestLevel(Level):
    """A level in a VMCB of its host."""

    def __init__(self, host: Level, *, npt: bool, name: str | None, enter_flags: EnterFlag) -> None:
        machine = host.cpu.machine
        super().__init__(host.cpu, host, machine.page_tables(), name=name)
        self.host = host
        self.enter_flags = enter_flags
        self.npt: PageTables | None = machine.page_tables() if npt else None
        """Its nested page tables; None with shadow paging."""
        self.vmcb = VmcbView(machine.memory, machine.pages.take())
        """The VMCB that its host runs it from."""
        self.msrpm = Msrpm(machine.memory, machine.pages.take(MSRPM_SIZE))
        self.iopm = Iopm(machine.memory, machine.pages.take(IOPM_SIZE))
        self.on_exit: list[ExitHook] = []
        """Asked in order before an exit is returned; the first True runs the guest on."""
        self.exit: VmExit | None = None
        """The last exit, which its host has not answered yet."""
        self.nesting: Nesting | None = None
        """How the host emulates SVM for it, once it hosts a guest itself."""
        self.entered_vmcb: Gpa = self.vmcb.gpa
        """The VMCB of the last VMRUN on its behalf: its own, or one merged for its own guest."""
        self._gprs_gpa = machine.pages.take()
        self._leaving = False
        self._write_vmcb()

    @property
    def nested_tables(self) -> PageTables:
        """Its nested page tables.

        Raises ProxyError: it runs with shadow paging.
        """
        if self.npt is None:
            raise ProxyError(f"{self.name} was launched without nested paging")
        return self.npt

    # Running

    def go_on(self, timeout_s: float | None = None) -> list[Result] | VmExit:
        """Let this level come to the end of its program, or to an exit."""
        seen = super().go_on(timeout_s)
        self.exit = seen if isinstance(seen, VmExit) else None
        return seen

    def resume(self, *, timeout_s: float | None = None) -> list[Result] | VmExit:
        """Run on after an exit: to the end of the program, or to the next exit.

        Raises ProxyError: there is no exit to go on from.
        """
        if self.exit is None:
            raise ProxyError(f"{self.name} has no exit to resume from\n{describe(self.cpu)}")
        exit_, self.exit = self.exit, None
        exit_.host.make_current(timeout_s)
        exit_.host.submit_entry(exit_.guest)
        return self.go_on(timeout_s)

    def finish(self, *, timeout_s: float | None = None) -> list[Result]:
        """Resume, and return the results of the program.

        Raises UnexpectedVmExit: there was another exit.
        """
        return self._finished(self.resume(timeout_s=timeout_s))

    def resume_to_exit(self, *, timeout_s: float | None = None) -> VmExit:
        """Resume, and return the next exit.

        Raises MissingVmExit: there was none.
        """
        return self._exited(self.resume(timeout_s=timeout_s))

    def enter(self, *, timeout_s: float | None = None) -> VmExit:
        """Let the host execute VMRUN with the VMCB just as it is now; return the exit.

        For guests that are no proxy (`vmcb["rip"]`), and for VMCBs that VMRUN must refuse. What the
        guest was in the middle of is forgotten.

        Raises GuestFault: VMRUN raised an exception in the host.
        Raises MissingVmExit: the proxy in the guest reported in place of an exit.
        """
        self.exit = None
        self.host.make_current(timeout_s)
        self.host.submit_entry(self)
        seen = self.cpu.advance(self._deadline(timeout_s))
        if not isinstance(seen, VmExit):
            raise MissingVmExit(self.name, [])
        self.exit = seen
        return seen

    def reset(self) -> None:
        """Write the VMCB as it was launched, without overrides; the proxy starts afresh.

        What it was in the middle of is abandoned; if it is current, its host is made that first.

        Raises ProxyError: it does not run, but does not wait for a program either.
        """
        self._leave_for_host()
        self.exit = self.entered = None
        self.started = False
        self._write_vmcb()
        if self.nesting is not None:
            self.nesting.reset()

    def leave(self, timeout_s: float | None = None) -> None:
        """Hand over to the host by a VMMCALL, which it must intercept.

        Raises ProxyError: it does not, or this level is in the middle of a program.
        """
        self._expect_idle()
        self._leaving = True
        try:
            self.instance.send([ops.vmmcall(LEAVE_MAGIC)])
            seen = self.cpu.advance(self._deadline(timeout_s))
        finally:
            self._leaving = False
        if not isinstance(seen, VmExit) or seen.guest is not self or seen.host is not self.host:
            self.exit = seen if isinstance(seen, VmExit) else None
            raise ProxyError(
                f"{self.name} cannot be left: its VMMCALL does not reach {self.host.name} ({seen})"
            )
        seen.skip(VMMCALL_LENGTH)

    def leaving(self, exit_: VmExit) -> bool:
        """Tell whether an exit is the one by which Python leaves this level."""
        return (
            self._leaving
            and exit_.exit_code == ExitCode.SVM_EXIT_VMMCALL
            and exit_.vmcb["rax"] == LEAVE_MAGIC
            and exit_.vmcb.gpa == self.vmcb.gpa
        )

    def handled(self, exit_: VmExit) -> bool:
        """Let the host deal with an exit: emulate SVM, ask the hooks; True: run on."""
        if self.nesting is not None and self.nesting.handle(exit_):
            return True
        return any(hook(exit_) for hook in self.on_exit)

    def _enter(self, timeout_s: float | None) -> None:
        if self.cpu.current is self:
            return
        if self.exit is not None:
            raise ProxyError(
                f"{self.name} is in the middle of a program, at {self.exit}: "
                "resume or reset it first"
            )
        if self.entered is not None:
            # Its guest exited to a level further out, and nobody answered that.
            raise ProxyError(
                f"{self.name} is inside VMRUN for {self.entered.name}: "
                f"resume {self.entered.name} or reset {self.name} first"
            )
        self.host._enter(timeout_s)
        self.host.submit_entry(self)
        seen = self.cpu.advance(self._deadline(timeout_s))
        if isinstance(seen, VmExit):
            self.exit = seen
            raise UnexpectedVmExit(seen)
        if seen is not self:
            raise ProxyFailure(f"{seen.name} reported, not {self.name}\n{describe(self.cpu)}")

    # Registers

    @property
    def gprs(self) -> proxy_gprs:
        """Its registers but RAX and RSP, while it does not run; a copy."""
        return self.cpu.machine.memory.read_struct(proxy_gprs, self._gprs_gpa)

    def set_gprs(self, **registers: int) -> None:
        """Change registers, while it does not run; RAX and RSP are in the VMCB.

        Raises ProxyError: no such register.
        """
        gprs = self.gprs
        for name, value in registers.items():
            if name in VMCB_REGISTERS or not hasattr(gprs, name):
                raise ProxyError(f"{name}: set it in the VMCB")
            setattr(gprs, name, value)
        self.cpu.machine.memory.write_struct(self._gprs_gpa, gprs)

    # The VMCB

    @property
    def vmcb_or_none(self) -> VmcbView | None:
        """The VMCB that this level runs from."""
        return self.vmcb

    def host_address(self, pa: int) -> int | None:
        """Return the host's physical address for one of this level; None: nowhere."""
        if self.npt is None:
            return pa
        found = translate(self.cpu.machine.memory, self.npt.root, pa)
        return found[0] if found else None

    def machine_address(self, pa: int) -> int | None:
        """Return where a physical address of this level lies in memory; None: nowhere."""
        outer = self.host_address(pa)
        return None if outer is None else self.host.machine_address(outer)

    def configure(self, values: Mapping[str, int]) -> None:
        """Change the VMCB such that it counts: by the host, which is made current first.

        Writing `vmcb` while this level is current changes memory, and nothing until the next VMRUN.
        """
        self._leave_for_host()
        self.vmcb.update(values)

    def _leave_for_host(self) -> None:
        if self.cpu.current is not None and self.hosts(self.cpu.current):
            self.host.make_current()

    def intercept_msr(self, index: int, *, read: bool = True, write: bool = True) -> None:
        """Intercept an MSR."""
        self.vmcb["intercept.msr_prot"] = 1
        self.msrpm.intercept(index, read=read, write=write)

    def intercept_port(self, port: int, size: int = 1) -> None:
        """Intercept ports."""
        self.vmcb["intercept.ioio_prot"] = 1
        self.iopm.intercept(port, size)

    def entry_op(self, rip_advance: int = 0) -> Op:
        """Return the operation by which its host runs it, for loops of VMRUN at guest speed too.

        Args:
            rip_advance: added to the guest's RIP after #VMEXIT.

        """
        merged = self.nesting.merged_vmcb if self.nesting is not None else None
        self.entered_vmcb = self.vmcb.gpa if merged is None else merged
        return ops.enter_guest(
            self.entered_vmcb,
            self._gprs_gpa,
            self.host.host_state_gpa,
            flags=self.enter_flags,
            rip_advance=rip_advance,
        )

    def enable_svm(self) -> None:
        """Let the host emulate SVM for this level, then as on any other level."""
        if self.nesting is None:
            self._leave_for_host()
            self.nesting = Nesting(self)
        super().enable_svm()

    def _write_vmcb(self) -> None:
        block = vmcb()
        control, save, context = block.control, block.save, self.context
        control.set_intercept(Intercept.INTERCEPT_VMRUN)
        control.set_intercept(Intercept.INTERCEPT_VMMCALL)
        control.msrpm_base_pa = self.msrpm.gpa
        control.iopm_base_pa = self.iopm.gpa
        control.asid = self.depth - 1
        if self.npt is not None:
            control.nested_ctl = NestedCtl.of(NP_ENABLE=1)
            control.nested_cr3 = self.npt.root
        _segment(save.cs, GDT_CS64, CODE64_ATTRIB)
        for name in ("ss", "ds", "es", "fs", "gs"):
            _segment(getattr(save, name), GDT_DS, DATA_ATTRIB)
        _segment(save.tr, GDT_TSS, TSS_ATTRIB, TSS_LIMIT, context.tss_base)
        _segment(save.gdtr, 0, 0, GDT_LIMIT, context.gdt_base)
        _segment(save.idtr, 0, 0, IDT_LIMIT, context.idt_base)
        save.cr0, save.cr3, save.cr4 = context.cr0, context.cr3, context.cr4
        save.efer = Efer(context.efer).replace(SVME=1)
        save.dr6, save.dr7 = DR6_DEFAULT, DR7_DEFAULT
        save.g_pat = PAT_DEFAULT
        save.rflags, save.rip, save.rsp = 2, context.rip, context.rsp
        self.vmcb.write(block)
        self.set_gprs(rdi=context.rdi)


def _segment(
    seg: vmcb_seg, selector: int, attrib: int, limit: int = 0xFFFF_FFFF, base: int = 0
) -> None:
    seg.selector, seg.attrib, seg.limit, seg.base = selector, attrib, limit, base
