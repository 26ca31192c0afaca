"""SVM instructions in real, virtual-8086, protected and compatibility mode, at CPL 0 and 3.

APM vol. 3, chapter 4 (the exceptions of each instruction: #UD in real and virtual-8086 mode, #GP at
CPL 3); vol. 2, 15.4 Enabling SVM, 15.9 Instruction Intercepts (exceptions go before intercepts).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from harness.facts import nested_svm
from harness.proxy.layout import GDT_CS32, GDT_CS64, GDT_USER_CS32, GDT_USER_CS64
from harness.proxy.level import Level
from harness.proxy.ops import instruction as line_of
from harness.proxy.program import GP, UD
from harness.scenarios.bare_code import THE_END, VM86, BareCode, Ending, ending_of, raised
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.l2 import proxy_machine
from harness.scenarios.test_instructions import ALL_BUT_VMMCALL, PRIVILEGED, WITH_VMCB
from harness.svm.exit_codes import ExitCode

HANG_S = 5.0
COMPATIBILITY: Final = "compatibility"
UNKNOWN_HYPERCALL: Final = 0x7FFF
"""KVM answers an error in RAX, which is no exception."""
ALL: Final = (*ALL_BUT_VMMCALL, "VMMCALL")


@dataclass(frozen=True)
class Place:
    """Where code is executed."""

    mode: str
    cpl: int = 0

    @property
    def recognizes_svm(self) -> bool:
        """Whether the SVM instructions exist in the mode: only protected mode has them."""
        return self.mode not in ("real", VM86)


PLACES: Final = {
    "real": Place("real"),
    VM86: Place(VM86, 3),
    "protected": Place("protected"),
    "protected_cpl3": Place("protected", 3),
    "legacy_paging": Place("legacy_paging"),
    "legacy_paging_cpl3": Place("legacy_paging", 3),
    COMPATIBILITY: Place(COMPATIBILITY),
    "compatibility_cpl3": Place(COMPATIBILITY, 3),
}


def expected_in_l1(instruction: str, place: Place) -> Ending:
    """Return what an SVM instruction does in L1 whose EFER.SVME is set."""
    if instruction == "VMMCALL":
        return THE_END
    if not place.recognizes_svm or instruction == "SKINIT":
        return raised(UD)
    return raised(GP) if place.cpl else THE_END


def compatibility_code(code: bytes, cpl: int) -> bytes:
    """Return 64-bit code that executes `code` in compatibility mode; it uses RDI."""
    inner, outer = (GDT_USER_CS32, GDT_USER_CS64) if cpl else (GDT_CS32, GDT_CS64)
    tail = code + b"\xcb"  # lret, by the frame that is pushed first
    to_inner = b"\x6a" + bytes((inner,)) + bytes.fromhex("488d3d03000000 57 48cb")
    """push $inner; lea 1f(%rip), %rdi; push %rdi; lretq; 1:"""
    frame = b"\xc7\x44\x24\x04" + outer.to_bytes(4, "little")
    after_lea = bytes.fromhex("893c24") + frame + to_inner + tail
    # sub $8, %rsp; lea the end(%rip), %rdi; mov %edi, (%rsp); movl $outer, 4(%rsp)
    return bytes.fromhex("4883ec08 488d3d") + len(after_lea).to_bytes(4, "little") + after_lea


def _run(level: Level, place: Place, code: bytes, rax: int) -> Ending:
    """Execute code as L1 in a place."""
    if place.mode != COMPATIBILITY:
        return BareCode(level, place.mode, place.cpl).run_in_l1(code, rax=rax)
    op = level.exec_op(compatibility_code(code, place.cpl), user=bool(place.cpl), rax=rax)
    fault = level.fault_of(op)
    return raised(fault.vector, fault.error_code) if fault else THE_END


@scenario(needs=[nested_svm], axes={"place": tuple(PLACES), "instruction": ALL})
def test_svm_instruction_in_another_mode(context: Context, place: str, instruction: str) -> None:
    """With SVME an SVM instruction is #UD outside protected mode, #GP at CPL 3, else legal."""
    l1 = proxy_machine(context, timeout_s=HANG_S).l1
    guest = l1.launch(npt=False)
    guest.vmcb["rip"] = guest.instance.put_code(line_of("VMMCALL").code)
    rax = {"VMMCALL": UNKNOWN_HYPERCALL}.get(instruction, 0)
    operand = guest.vmcb.gpa if instruction in WITH_VMCB else rax
    seen = _run(l1, PLACES[place], line_of(instruction).code, operand)
    context.expect(instruction, seen, expected_in_l1(instruction, PLACES[place]), str)


_EXITS: Final = {name: ExitCode[f"SVM_EXIT_{name}"] for name in (*PRIVILEGED, "VMMCALL")}
"""SKINIT is left out: where CPUID does not offer it, #UD may go before its intercept."""


def _expected_in_l2(instruction: str, place: Place) -> Ending:
    if instruction != "VMMCALL":
        if not place.recognizes_svm:
            return raised(UD)
        if place.cpl:
            return raised(GP)
    return Ending(_EXITS[instruction].name)


_L2_PLACES: Final = (
    "real",
    VM86,
    "protected",
    "protected_cpl3",
    COMPATIBILITY,
    "compatibility_cpl3",
)


@scenario(needs=[nested_svm], axes={"place": _L2_PLACES, "instruction": tuple(_EXITS)}, levels=2)
def test_exceptions_of_svm_instructions_go_before_intercepts(
    context: Context, place: str, instruction: str
) -> None:
    """An intercepted SVM instruction of L2 raises #UD and #GP of its mode and CPL first."""
    where = PLACES[place]
    l1 = proxy_machine(context, timeout_s=HANG_S).l1
    l2 = l1.launch(vmcb={f"intercept.{instruction.lower()}": 1})
    operand = l2.vmcb.gpa if instruction in WITH_VMCB else 0
    code = line_of(instruction).code
    wanted = _expected_in_l2(instruction, where)
    if where.mode != COMPATIBILITY:
        bare = BareCode(l2, where.mode, where.cpl)
        seen = bare.run_in_l2(code, rax=operand)
        context.expect(instruction, seen, wanted, str)
        return
    op = l2.exec_op(compatibility_code(code, where.cpl), user=bool(where.cpl), rax=operand)
    if wanted in (raised(UD), raised(GP)):
        fault = l2.fault_of(op)
        seen = raised(fault.vector, fault.error_code) if fault else THE_END
    else:
        seen = ending_of(l2.run_to_exit(op))
    context.expect(instruction, seen, wanted, str)


@scenario(needs=[nested_svm], axes={"mode": ("protected", "legacy_paging", "pae_paging")}, levels=2)
def test_legacy_l1_runs_a_64_bit_l2(context: Context, mode: str) -> None:
    """L1 outside long mode enters an L2 in long mode, and is in its own mode after #VMEXIT."""
    l1 = proxy_machine(context, timeout_s=HANG_S).l1
    l2 = l1.launch(npt=False, vmcb={"rax": 0})
    # mov $value, %rax with a value of 64 bits; vmmcall
    value = 0x0123_4567_89AB_CDEF
    code = b"\x48\xb8" + value.to_bytes(8, "little") + line_of("VMMCALL").code
    at = l2.vmcb["rip"] = l2.instance.put_code(code)
    # The end's INT goes through L1's own 32-bit tables: it needs all that #VMEXIT brings back.
    seen = BareCode(l1, mode).run_in_l1(line_of("VMRUN").code, rax=l2.vmcb.gpa)
    context.expect("L1's VMRUN", seen, THE_END, str)
    context.expect("exit code", l2.vmcb["exit_code"], int(ExitCode.SVM_EXIT_VMMCALL), hex)
    context.expect("RAX of L2", l2.vmcb["rax"], value, hex)
    context.expect("RIP of L2", l2.vmcb["rip"], at + 10, hex)
