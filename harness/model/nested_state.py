"""KVM_GET_NESTED_STATE and KVM_SET_NESTED_STATE, to the byte of every field.

Source: `svm_get_nested_state()`, `svm_set_nested_state()`, `kvm_arch_vcpu_ioctl()`.
"""

from __future__ import annotations

import ctypes
from typing import Final

from harness.model import layout
from harness.model.areas import CONTROL, SAVE, VMCB, VMRUN_STATE, fitted
from harness.model.checks import set_state_violations
from harness.model.crs import is_legal_cr3
from harness.model.errors import CannotKnow
from harness.model.leave import leave_nested
from harness.model.memory import UNKNOWN
from harness.model.operations import GetNestedState, SetNestedState, Value
from harness.model.state import Kept, State
from harness.model.vmrun import cached_control
from harness.svm.msrs import Cr0
from kvm_ioctl.asm_kvm import (
    KVM_STATE_NESTED_SVM_VMCB_SIZE,
    NestedFormat,
    NestedStateFlags,
    kvm_nested_state,
)

HEADER_BYTES: Final = ctypes.sizeof(kvm_nested_state)
WHOLE_BYTES: Final = HEADER_BYTES + KVM_STATE_NESTED_SVM_VMCB_SIZE

GUEST_MODE: Final = int(NestedStateFlags.KVM_STATE_NESTED_GUEST_MODE)
RUN_PENDING: Final = int(NestedStateFlags.KVM_STATE_NESTED_RUN_PENDING)
GIF_SET: Final = int(NestedStateFlags.KVM_STATE_NESTED_GIF_SET)
_KNOWN_FLAGS: Final = int(sum(NestedStateFlags))
_SVM_FLAGS: Final = GUEST_MODE | RUN_PENDING | GIF_SET
_RFLAGS_FIXED: Final = 2


def is_offered(s: State) -> bool:
    """Tell whether both ioctls are there at all."""
    return s.facts.nested or s.knobs.nested_state_with_nested_0 == "handled"


def flags(s: State) -> int:
    """Return the flags that KVM_GET_NESTED_STATE gives."""
    found = GIF_SET if s.gif else 0
    if s.guest_mode:
        found |= GUEST_MODE | (RUN_PENDING if s.run_pending else 0)
    return found


def size_bytes(s: State) -> int:
    """Return the size that it gives to a buffer that is large enough."""
    return WHOLE_BYTES if s.guest_mode else HEADER_BYTES


def saved_l1(s: State) -> dict[str, int]:
    """Return L1's state in the blob, by the names of the save area, as far as it is known."""
    if s.knobs.l1_state == "hsave page":
        return {**dict.fromkeys(SAVE, 0), **s.l1}
    return {name: s.l1[name] for name in (*VMRUN_STATE, "cpl")}


def get_nested_state(s: State, what: GetNestedState) -> tuple[str, dict[str, Value]]:
    """Do the ioctl; return its errno or `ok`, and what it gave in flags and size."""
    if not is_offered(s):
        return "EINVAL", {}
    if what.size < HEADER_BYTES:
        return "E2BIG", {"get.size": HEADER_BYTES}
    if what.size < size_bytes(s):
        return "E2BIG", {"get.size": size_bytes(s)}
    s.kept = Kept()
    if s.guest_mode:
        save = dict.fromkeys(SAVE, UNKNOWN) | saved_l1(s)
        s.kept = Kept(dict(s.control), save)
    return "ok", {"get.size": size_bytes(s), "get.flags": flags(s)}


def set_nested_state(s: State, what: SetNestedState) -> str:
    """Do the ioctl; return its errno or `ok`. The checks are in KVM's order."""
    if not is_offered(s) or not _header_serves(s, what):
        return "EINVAL"
    if not what.flags & GUEST_MODE:
        leave_nested(s)
        s.gif = bool(what.flags & GIF_SET)
        s.stgi_open |= s.gif
        return "ok"
    if not s.facts.is_page_address(what.vmcb_pa) or what.size < WHOLE_BYTES:
        return "EINVAL"
    control, save = _data(s, what)
    cr0 = Cr0(s.regs["cr0"])
    if (cr0.NW and not cr0.CD) or set_state_violations(control, save, s.knobs, s.facts):
        return "EINVAL"
    _enter(s, what, control, save)
    if what.kept:
        # Checks took what the model does not know for 0; it is no more known for that.
        unknown = (n for n, value in s.kept.control.items() if value == UNKNOWN)
        s.control |= {n: UNKNOWN for n in unknown if f"control.{n}" not in what.changes}
    if s.knobs.set_state_checks_cr3 and s.regs["cr3"] == UNKNOWN:
        raise CannotKnow("CR3 is L1's or L2's, and KVM checks it")
    if s.knobs.set_state_checks_cr3 and not is_legal_cr3(s.regs["cr3"], s.facts):
        # Too late: the vCPU is in guest mode already.
        return "EINVAL"
    s.pages_pending = True
    return "ok"


def _header_serves(s: State, what: SetNestedState) -> bool:
    if what.size < HEADER_BYTES or what.flags & ~_KNOWN_FLAGS:
        return False
    if what.flags & RUN_PENDING and not what.flags & GUEST_MODE:
        return False
    if what.format != NestedFormat.KVM_STATE_NESTED_FORMAT_SVM or what.flags & ~_SVM_FLAGS:
        return False
    if not s.svme:
        allowed = {GIF_SET} if s.knobs.set_state_without_svme == "only GIF_SET" else {0, GIF_SET}
        if what.flags not in allowed:
            return False
    return not (s.smm and what.flags & GUEST_MODE)


def _data(s: State, what: SetNestedState) -> tuple[dict[str, int], dict[str, int]]:
    """Return control and save area of what is given."""
    given = dict.fromkeys(VMCB, 0)
    if what.kept:
        given |= {f"control.{name}": value for name, value in s.kept.control.items()}
        given |= {f"save.{name}": value for name, value in s.kept.save.items()}
    else:
        given |= layout.template_nested_state()
    given |= fitted(VMCB, what.changes)
    # What the model does not know of vmcb01 is nothing that a check would refuse.
    known = {name: 0 if value == UNKNOWN else value for name, value in given.items()}
    control = {name: known[f"control.{name}"] for name in CONTROL}
    return control, {name: known[f"save.{name}"] for name in SAVE}


def _enter(s: State, what: SetNestedState, control: dict[str, int], save: dict[str, int]) -> None:
    """Go into guest mode with the current registers for L2's."""
    s.l1_gif = s.gif
    if s.knobs.l1_state == "hsave page":
        s.l1 = save
    else:
        s.l1 = {name: save[name] for name in VMRUN_STATE}
        s.l1 |= {"rflags": save["rflags"] | _RFLAGS_FIXED, "cpl": 0}
    s.run_pending = bool(s.knobs.set_state_restores_run_pending and what.flags & RUN_PENDING)
    if s.knobs.set_state_gif_in_gm == "honoured":
        s.gif = s.l1_gif = bool(what.flags & GIF_SET)
    s.control = cached_control(s, control)
    s.next_rip_given |= bool(s.control["next_rip"])
    s.vmcb12_gpa = what.vmcb_pa
    s.guest_mode = True
    s.l2_exit_code = UNKNOWN
