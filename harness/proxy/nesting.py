"""A host's emulation of SVM for its guest, so that the guest hosts guests of its own.

The host sees every SVM instruction of its guest as an exit. VMRUN it answers with a VMCB merged
from the guest's and its own; an exit that the guest asked for is written into the guest's VMCB and
the guest goes on after its VMRUN (APM vol. 2, 15.5 VMRUN Instruction, 15.6 #VMEXIT). What the
merged VMCB does not hide is left to the CPU to check: it refuses that as it would the guest's.

Interrupts and NMIs are held back while the guest's GIF is 0 (`virtual_gif`). SMIs are not: VMRUN
sets the CPU's GIF, and an SMI that the host intercepts comes at once when the host executes STGI.
Only the handler and the save area tell; the guest cannot look into SMM.

The guest could tell by these: physical interrupts of a guest's guest with V_INTR_MASKING wait for
the host's RFLAGS.IF, not for the guest's; V_GIF_ENABLE and LBR virtualization are ignored; an NMI
that is held while VMRUN itself injects an event comes with the guest's next STGI or VMRUN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from harness.machine.addresses import Gpa
from harness.machine.errors import GuestMemoryError
from harness.proxy.failure import ProxyError
from harness.proxy.paging import PAGE
from harness.proxy.permissions import Iopm, Msrpm, msrpm_bit
from harness.proxy.program import GP, UD
from harness.proxy.shadow_npt import Outcome, ShadowNpt
from harness.proxy.virtual_gif import VirtualGif
from harness.proxy.vmcb_view import VmcbView
from harness.proxy.vmexit import VmExit
from harness.svm.exit_codes import VMEXIT_INVALID, ExitCode
from harness.svm.exit_info import IoioInfo
from harness.svm.intercepts import Intercept
from harness.svm.msrs import Efer, Msr
from harness.svm.vmcb import (
    IOPM_SIZE,
    MSRPM_SIZE,
    EventInj,
    IntCtl,
    NestedCtl,
    vmcb,
    vmcb_save_area,
)

if TYPE_CHECKING:
    from harness.proxy.guest_level import GuestLevel

VMRUN_STATE: Final = (
    *("es", "cs", "ss", "ds", "gdtr", "idtr", "cpl", "efer", "cr0", "cr2", "cr3", "cr4"),
    *("dr6", "dr7", "rflags", "rip", "rsp", "rax"),
)
"""Fields that #VMEXIT writes (APM vol. 2, 15.6 #VMEXIT)."""

VMLOAD_STATE: Final = (
    *("fs", "gs", "tr", "ldtr", "kernel_gs_base", "star", "lstar", "cstar", "sfmask"),
    *("sysenter_cs", "sysenter_esp", "sysenter_eip"),
)
"""Fields that VMLOAD and VMSAVE move (APM vol. 2, 15.5.2 VMSAVE and VMLOAD Instructions)."""

EMULATED: Final = (
    Intercept.INTERCEPT_VMRUN,
    Intercept.INTERCEPT_VMLOAD,
    Intercept.INTERCEPT_VMSAVE,
    Intercept.INTERCEPT_STGI,
    Intercept.INTERCEPT_CLGI,
    Intercept.INTERCEPT_SKINIT,
    Intercept.INTERCEPT_INVLPGA,
    Intercept.INTERCEPT_MSR_PROT,
)
"""Intercepts that the host needs for this."""

VIRTUAL_MSRS: Final = (Msr.MSR_VM_HSAVE_PA, Msr.MSR_VM_CR)
"""MSRs of the guest that are not the host's; EFER is a third, in the guest itself only."""

ASID_OFFSET: Final = 0x20
"""The guest's guest has another ASID than the guest."""

DR7_RESET: Final = 0x400
_TLB_FLUSH_ALL = 1
_LENGTH = 3
_GUEST_INT_CTL = (
    IntCtl.V_TPR.mask
    | IntCtl.V_IRQ.mask
    | IntCtl.V_INTR_PRIO.mask
    | IntCtl.V_IGN_TPR.mask
    | IntCtl.V_INTR_MASKING.mask
)
_EFER_KNOWN = Efer.of(SCE=1, LME=1, LMA=1, NX=1, SVME=1, LMSLE=1, FFXSR=1, TCE=1, AUTOIBRS=1)
_MSR_EXIT_WRITE = 1


class Nesting:
    """The SVM that a host gives to one guest."""

    def __init__(self, guest: GuestLevel) -> None:
        machine = guest.cpu.machine
        self.guest = guest
        self.host = guest.host
        self.svme = False
        """EFER.SVME as the guest sees it."""
        self.gif = VirtualGif(guest)
        self.msrs: dict[int, int] = dict.fromkeys(VIRTUAL_MSRS, 0)
        self.inner_pa: int | None = None
        """The VMCB, by the guest's physical address, that it is inside VMRUN for."""
        self._memory = machine.memory
        self._merged = VmcbView(machine.memory, machine.pages.take())
        self._msrpm = Msrpm(machine.memory, machine.pages.take(MSRPM_SIZE))
        self._iopm = Iopm(machine.memory, machine.pages.take(IOPM_SIZE))
        self._shadow = ShadowNpt(machine.memory, machine.pages, machine.tables_changed)
        self._asked_for_msrs = bool(guest.vmcb["intercept.msr_prot"])
        self._intercept()

    def _intercept(self) -> None:
        for bit in EMULATED:
            self.guest.vmcb[f"intercept.{bit.name}"] = 1
        for index in (*VIRTUAL_MSRS, Msr.MSR_EFER):
            self.guest.msrpm.intercept(index)

    def reset(self) -> None:
        """Go on with a guest that starts afresh, from a VMCB that was written anew.

        What it wrote to MSRs stays.
        """
        self.inner_pa = None
        self.gif.reset()
        self._intercept()

    @property
    def merged_vmcb(self) -> Gpa | None:
        """The VMCB to run in place of the guest's own, while its guest is current."""
        return None if self.inner_pa is None else self._merged.gpa

    def handle(self, exit_: VmExit) -> bool:
        """Emulate what caused an exit, or hand it to the guest; False: it is the host's affair."""
        return self._handle_own(exit_) if self.inner_pa is None else self._handle_inner(exit_)

    def _handle_own(self, exit_: VmExit) -> bool:
        if exit_.exit_code == ExitCode.SVM_EXIT_MSR:
            return self._emulate_msr(exit_, with_efer=True)
        if exit_.exit_code == ExitCode.SVM_EXIT_NMI and self.gif.holds_nmis:
            self.gif.hold_nmi()
            _inject_again(exit_.vmcb)
            return True
        instruction = self._instruction(exit_.exit_code)
        if instruction is None:
            return False
        if not self.svme:
            self._inject(UD)
        else:
            instruction()
        return True

    def _handle_inner(self, exit_: VmExit) -> bool:
        if exit_.exit_code == ExitCode.SVM_EXIT_NPF and self._inner()["nested_ctl.NP_ENABLE"]:
            return self._inner_npf(exit_)
        if self._guest_wants(exit_):
            self._reflect(exit_.exit_info_1, exit_.exit_info_2)
            return True
        if exit_.exit_code == ExitCode.SVM_EXIT_MSR:
            return self._emulate_msr(exit_, with_efer=False)
        return False

    def _guest_wants(self, exit_: VmExit) -> bool:
        inner, code = self._inner(), exit_.exit_code
        if code == VMEXIT_INVALID or code & 0xFFFF_FFFF == 0xFFFF_FFFF:
            return True
        if code >= 32 * 6 or not inner.has_intercept(code):
            return False
        if code == ExitCode.SVM_EXIT_MSR:
            msrpm = Msrpm(self._memory, self._machine(inner["msrpm_base_pa"] & -PAGE))
            return msrpm.intercepts(exit_.gprs.rcx & 0xFFFF_FFFF, bool(exit_.exit_info_1))
        if code == ExitCode.SVM_EXIT_IOIO:
            iopm = Iopm(self._memory, self._machine(inner["iopm_base_pa"] & -PAGE))
            info = IoioInfo(exit_.exit_info_1)
            return iopm.intercepts(info.PORT, info.size_bytes)
        return True

    def _instruction(self, exit_code: int) -> Callable[[], None] | None:
        """Return what answers an SVM instruction of the guest; None: the exit is no such."""
        answers: dict[int, Callable[[], None]] = {
            ExitCode.SVM_EXIT_VMRUN: self._vmrun,
            ExitCode.SVM_EXIT_VMLOAD: lambda: self._move_state(load=True),
            ExitCode.SVM_EXIT_VMSAVE: lambda: self._move_state(load=False),
            ExitCode.SVM_EXIT_STGI: self._stgi,
            ExitCode.SVM_EXIT_CLGI: self._clgi,
            ExitCode.SVM_EXIT_INVLPGA: self._skip,  # every entry flushes
            ExitCode.SVM_EXIT_SKINIT: lambda: self._inject(UD),
        }
        return answers.get(exit_code)

    # VMRUN and #VMEXIT

    def _vmrun(self) -> None:
        view = self._operand()
        if view is None:
            self._inject(GP)
            return
        address = self.guest.vmcb["rax"]
        self._skip()
        inner = view.read()
        if not self._is_consistent(inner):
            view.update({"exit_code": VMEXIT_INVALID, "exit_info_1": 0, "exit_info_2": 0})
            self.gif.clear()
            return
        self.inner_pa = address
        self.gif.set()
        self._merge(inner)
        if not self.gif.nmi_held or inner.control.event_inj & EventInj.VALID.mask:
            return
        if inner.control.has_intercept(Intercept.INTERCEPT_NMI):
            self._merged.update({"exit_code": ExitCode.SVM_EXIT_NMI, "exit_int_info": 0})
            self._reflect(0, 0)
        else:
            self.gif.inject_held_nmi(self._merged)

    def _is_consistent(self, inner: vmcb) -> bool:
        """Check what the merged VMCB would hide (APM vol. 2, 15.5.1 Basic Operation)."""
        control = inner.control
        limit = self.guest.cpu.machine.memory_bytes
        maps = (
            (Intercept.INTERCEPT_MSR_PROT, control.msrpm_base_pa, MSRPM_SIZE),
            (Intercept.INTERCEPT_IOIO_PROT, control.iopm_base_pa, IOPM_SIZE),
        )
        return (
            control.has_intercept(Intercept.INTERCEPT_VMRUN)
            and control.asid != 0
            and all(base + size <= limit for bit, base, size in maps if control.has_intercept(bit))
        )

    def _merge(self, inner: vmcb) -> None:
        own = self.guest.vmcb.read()
        merged = inner.copy()
        control, outer = merged.control, own.control
        for word in range(len(control.intercepts)):
            control.intercepts[word] |= outer.intercepts[word]
        control.msrpm_base_pa, control.iopm_base_pa = self._msrpm.gpa, self._iopm.gpa
        self._merge_maps(inner, own)
        control.tsc_offset = (inner.control.tsc_offset + outer.tsc_offset) % (1 << 64)
        control.asid = outer.asid + ASID_OFFSET
        control.tlb_ctl = _TLB_FLUSH_ALL
        control.int_ctl = inner.control.int_ctl & _GUEST_INT_CTL
        control.int_ctl |= outer.int_ctl & IntCtl.V_INTR_MASKING.mask
        control.clean = 0
        control.virt_ext = 0
        control.nested_ctl, control.nested_cr3 = self._nested_paging(inner, own)
        _copy_fields(own.save, merged.save, VMLOAD_STATE)
        self._merged.write(merged)

    def _merge_maps(self, inner: vmcb, own: vmcb) -> None:
        guest = self.guest
        for bit, mine, base, merged in (
            (Intercept.INTERCEPT_MSR_PROT, guest.msrpm, inner.control.msrpm_base_pa, self._msrpm),
            (Intercept.INTERCEPT_IOIO_PROT, guest.iopm, inner.control.iopm_base_pa, self._iopm),
        ):
            data = mine.read() if own.control.has_intercept(bit) else bytes(mine.size_bytes)
            if inner.control.has_intercept(bit):
                theirs = self._memory.read(self._machine(base & -PAGE), mine.size_bytes)
                data = _or_bytes(data, theirs)
            merged.write(data)
        if own.control.has_intercept(Intercept.INTERCEPT_MSR_PROT):
            wants = inner.control.has_intercept(Intercept.INTERCEPT_MSR_PROT) and Msrpm(
                self._memory, self._machine(inner.control.msrpm_base_pa & -PAGE)
            )
            # Only the guest's own EFER is virtual; its guest's is in the merged VMCB.
            for write in (False, True):
                on = bool(wants) and wants.intercepts(Msr.MSR_EFER, write)
                self._msrpm.intercept(Msr.MSR_EFER, read=not write, write=write, on=on)

    def _nested_paging(self, inner: vmcb, own: vmcb) -> tuple[int, int]:
        enabled = NestedCtl.of(NP_ENABLE=1)
        if not NestedCtl(inner.control.nested_ctl).NP_ENABLE:
            return own.control.nested_ctl, own.control.nested_cr3
        if self.guest.npt is None:
            # The guest's physical addresses are the host's: its tables will do.
            return enabled, inner.control.nested_cr3
        if inner.control.tlb_ctl:
            self._shadow.flush(inner.control.nested_cr3)
        else:
            self._shadow.refresh(inner.control.nested_cr3)
        return enabled, self._shadow.root

    def _inner_npf(self, exit_: VmExit) -> bool:
        if self.guest.npt is None:
            self._reflect(exit_.exit_info_1, exit_.exit_info_2)
            return True
        outcome, info = self._shadow.fault(
            exit_.exit_info_2,
            exit_.exit_info_1,
            self.guest.machine_address,
            self.guest.host_address,
        )
        if outcome is Outcome.GUEST:
            self._reflect(info, exit_.exit_info_2)
        elif outcome is Outcome.FILLED:
            _inject_again(self._merged)
        return outcome is not Outcome.HOST

    def _reflect(self, exit_info_1: int, exit_info_2: int) -> None:
        """Do the guest's #VMEXIT: its VMCB gets the state, the guest goes on after its VMRUN."""
        view, merged = self._inner(), self._merged.read()
        inner, own = view.read(), self.guest.vmcb.read()
        control = inner.control
        control.exit_code = merged.control.exit_code
        control.exit_info_1, control.exit_info_2 = exit_info_1, exit_info_2
        if merged.control.exit_code & 0xFFFF_FFFF != 0xFFFF_FFFF:
            _copy_fields(merged.save, inner.save, VMRUN_STATE)
            for name in ("int_state", "exit_int_info", "exit_int_info_err", "next_rip"):
                setattr(control, name, getattr(merged.control, name))
            kept = control.int_ctl & ~(IntCtl.V_TPR.mask | IntCtl.V_IRQ.mask)
            control.int_ctl = kept | merged.control.int_ctl & (
                IntCtl.V_TPR.mask | IntCtl.V_IRQ.mask
            )
            # #VMEXIT leaves CR2 as the guest's guest had it.
            own.save.cr2 = merged.save.cr2
        control.event_inj = 0
        view.write(inner)
        _copy_fields(merged.save, own.save, VMLOAD_STATE)
        own.save.dr7 = DR7_RESET
        own.control.event_inj = 0
        self.guest.vmcb.write(own)
        self.inner_pa = None
        if control.exit_code == ExitCode.SVM_EXIT_NMI:
            # The host has taken it by now; the guest is to find it when it executes STGI.
            self.gif.hold_nmi()
        self.gif.clear()

    # The other instructions

    def _move_state(self, *, load: bool) -> None:
        view = self._operand()
        if view is None:
            self._inject(GP)
            return
        own, other = self.guest.vmcb.read(), view.read()
        if load:
            _copy_fields(other.save, own.save, VMLOAD_STATE)
            self.guest.vmcb.write(own)
        else:
            _copy_fields(own.save, other.save, VMLOAD_STATE)
            view.write(other)
        self._skip()

    def _stgi(self) -> None:
        self._skip()
        self.gif.set()
        self.gif.inject_held_nmi(self.guest.vmcb)

    def _clgi(self) -> None:
        self._skip()
        self.gif.clear()

    def _emulate_msr(self, exit_: VmExit, *, with_efer: bool) -> bool:
        index = exit_.gprs.rcx & 0xFFFF_FFFF
        is_write = bool(exit_.exit_info_1 & _MSR_EXIT_WRITE)
        if msrpm_bit(index) is None and not self._asked_for_msrs:
            # Exits only because MSR_PROT is on; by itself it would be an MSR that there is not.
            self._inject(GP, exit_.vmcb)
            return True
        if index not in self.msrs and not (with_efer and index == Msr.MSR_EFER):
            return False
        vmcb_ = exit_.vmcb
        if not is_write:
            value = self._read_msr(index)
            vmcb_["rax"] = value & 0xFFFF_FFFF
            self.guest.set_gprs(rdx=value >> 32)
        elif not self._write_msr(
            index, (exit_.gprs.rdx & 0xFFFF_FFFF) << 32 | vmcb_["rax"] & 0xFFFF_FFFF
        ):
            self._inject(GP, vmcb_)
            return True
        vmcb_["rip"] += 2
        return True

    def _read_msr(self, index: int) -> int:
        if index == Msr.MSR_EFER:
            return Efer(self.guest.vmcb["efer"]).replace(SVME=int(self.svme))
        return self.msrs[index]

    def _write_msr(self, index: int, value: int) -> bool:
        """Write a virtual MSR; False: that is a #GP."""
        if index == Msr.MSR_EFER:
            return self._write_efer(value)
        if index == Msr.MSR_VM_HSAVE_PA and (
            value % PAGE or value >= self.guest.cpu.machine.memory_bytes
        ):
            return False
        self.msrs[index] = value
        return True

    def _write_efer(self, value: int) -> bool:
        old, new = Efer(self.guest.vmcb["efer"]), Efer(value)
        if new & ~_EFER_KNOWN or new.LME != old.LME:
            return False
        self.svme = bool(new.SVME)
        self.guest.vmcb["efer"] = new.replace(SVME=1, LMA=old.LMA)
        return True

    # Small change

    def _inner(self) -> VmcbView:
        if self.inner_pa is None:
            raise ProxyError(f"{self.guest.name} is not inside VMRUN")
        return VmcbView(self._memory, self._machine(self.inner_pa))

    def _operand(self) -> VmcbView | None:
        """Return the VMCB that the guest's RAX names; None if there can be none."""
        address = self.guest.vmcb["rax"]
        machine = None if address % PAGE else self.guest.machine_address(address)
        if machine is None:
            return None
        try:
            self._memory.read_int(Gpa(machine), 8)
        except GuestMemoryError:
            return None
        return VmcbView(self._memory, Gpa(machine))

    def _machine(self, address: int) -> Gpa:
        machine = self.guest.machine_address(address)
        return Gpa(address if machine is None else machine)

    def _skip(self) -> None:
        self.guest.vmcb["rip"] += _LENGTH

    def _inject(self, vector: int, view: VmcbView | None = None) -> None:
        """Raise an exception at the instruction that exited."""
        error = vector == GP
        event = EventInj.of(VALID=1, TYPE=3, VEC=vector, VALID_ERR=int(error))
        target = self.guest.vmcb if view is None else view
        target.update({"event_inj": event, "event_inj_err": 0})


def _inject_again(view: VmcbView) -> None:
    """Inject what an exit found in the midst of delivery (APM vol. 2, 15.7.2 EXITINTINFO)."""
    view["event_inj"] = view["control.exit_int_info"]
    view["event_inj_err"] = view["exit_int_info_err"]


def _copy_fields(source: vmcb_save_area, target: vmcb_save_area, names: tuple[str, ...]) -> None:
    for name in names:
        setattr(target, name, getattr(source, name))


def _or_bytes(one: bytes, other: bytes) -> bytes:
    size = len(one)
    return (int.from_bytes(one, "little") | int.from_bytes(other, "little")).to_bytes(
        size, "little"
    )
