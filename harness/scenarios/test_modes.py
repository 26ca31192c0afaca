"""L2 in every mode: real, protected, legacy and PAE paging, compatibility and 64-bit mode.

APM vol. 2, 1.3 Operating Modes, 5 Page Translation and Protection, 15.5.1 Basic Operation.
"""

from __future__ import annotations

from typing import Final

from harness.facts import nested_svm
from harness.machine.addresses import Gpa
from harness.proxy.ops import instruction
from harness.proxy.paging import Pte
from harness.proxy.program import PF
from harness.scenarios.case import scenario
from harness.scenarios.context import Context
from harness.scenarios.l2 import expect_exit, proxy_machine
from harness.scenarios.modes import ALIAS, MODES, STORED
from harness.svm.exit_codes import ExitCode

HANG_S = 5.0
UNMAPPED: Final = 0x8000_0000

# xor %eax, %eax, then a byte that is DEC but in 64-bit mode, where it is a REX prefix; nop
_WHICH_MODE = bytes.fromhex("31c0 48 90")
_VMMCALL = instruction("VMMCALL").code


_PAGING_32 = ("legacy_paging", "pae_paging", "compatibility")
NPT: Final = (True, False)


@scenario(needs=[nested_svm], axes={"mode": tuple(MODES), "npt": NPT}, levels=2)
def test_l2_runs_in_every_mode(context: Context, mode: str, npt: bool) -> None:
    """L2 executes, translates and exits in the mode that the VMCB describes."""
    how = MODES[mode]
    machine = proxy_machine(context, timeout_s=HANG_S)
    l2 = machine.l1.launch(npt=npt, vmcb={"rax": 0})
    state = how.state(l2)
    address = 0x10 if how.real else l2.scratch + 0x10
    code = _WHICH_MODE + how.store(address + (ALIAS if how.paging else 0)) + _VMMCALL
    at = l2.instance.put_code(code)
    l2.vmcb.update(state)
    l2.vmcb.update({"cs.base": at, "rip": 0} if how.real else {"rip": at})
    exit_ = l2.enter()
    expect_exit(context, exit_, ExitCode.SVM_EXIT_VMMCALL)
    context.expect("RAX", exit_.vmcb["rax"], how.rax, hex)
    start = 0 if how.real else at
    context.expect("RIP", exit_.vmcb["rip"], start + len(code) - len(_VMMCALL), hex)
    seen = machine.memory.read_int(Gpa(l2.scratch + 0x10), 4)
    context.expect("what L2 stored", seen, STORED, hex)
    for name in ("cr0", "cr3", "cr4", "efer", "cs.attrib"):
        context.expect(f"{name} after #VMEXIT", exit_.vmcb[name], int(state[name]), hex)
    context.expect("L1 alive", machine.l1.ping(), True)


@scenario(needs=[nested_svm], axes={"mode": _PAGING_32, "npt": NPT}, levels=2)
def test_32_bit_page_fault_exits(context: Context, mode: str, npt: bool) -> None:
    """An intercepted #PF of 32-bit L2 has its error code and address."""
    how = MODES[mode]
    machine = proxy_machine(context, timeout_s=HANG_S)
    l2 = machine.l1.launch(npt=npt, vmcb={f"intercept.excp.{PF}": 1})
    l2.vmcb.update(how.state(l2))
    at = l2.instance.put_code(how.store(UNMAPPED) + _VMMCALL)
    l2.vmcb["rip"] = at
    exit_ = l2.enter()
    expect_exit(context, exit_, ExitCode.SVM_EXIT_EXCP_BASE + PF)
    context.expect("EXITINFO1", exit_.exit_info_1, Pte.W, hex)
    context.expect("EXITINFO2", exit_.exit_info_2, UNMAPPED, hex)
    context.expect("RIP", exit_.vmcb["rip"], at, hex)
