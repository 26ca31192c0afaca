"""What the model, and the manual, say of a cell."""

from __future__ import annotations

from collections.abc import Mapping

from harness.fields.rows import EARLY, ENTERED, LATE, STOPPED, TAKEN, Predicted
from harness.fields.template import area
from harness.fields.vehicle import Vehicle
from harness.machine.guest_abi import PAGE_SIZE
from harness.model.checks import (
    Check,
    apm_violations,
    control_violations,
    cpu_violations,
    intercepted,
    late_violations,
    save_violations,
    set_state_violations,
)
from harness.model.knobs import Knobs
from harness.svm.intercepts import Intercept
from harness.svm.vmcb import MSRPM_SIZE, NestedCtl


def predict(vehicle: Vehicle, fields: Mapping[str, int], knobs: Knobs) -> Predicted:
    """Return what a kernel on the vehicle's CPU does with a vmcb12."""
    control, save, facts = area(fields, "control"), area(fields, "save"), vehicle.facts
    early = control_violations(control, knobs, facts) + save_violations(save, knobs, facts)
    late = late_violations(
        save,
        control,
        knobs,
        facts,
        pdptes=vehicle.pdptes(fields),
        msrpm_readable=vehicle.has_memory(control.get("msrpm_base_pa", 0) & -PAGE_SIZE, MSRPM_SIZE),
    )
    late += cpu_violations(control, save, facts, facts.silicon)
    stops = () if early or late else _stops(vehicle, control, knobs)
    return Predicted(
        EARLY if early else LATE if late else STOPPED if stops else ENTERED,
        _names(early or late) or stops,
        "EINVAL" if set_state_violations(control, save, knobs, facts) else TAKEN,
        _names(apm_violations(control, save, facts)),
    )


def _stops(vehicle: Vehicle, control: Mapping[str, int], knobs: Knobs) -> tuple[str, ...]:
    """Return why L2 does not come back to L1, although all is intercepted that can be."""
    np_enabled = NestedCtl(control.get("nested_ctl", 0)).NP_ENABLE
    root = control.get("nested_cr3", 0) & -PAGE_SIZE
    if np_enabled and not vehicle.has_memory(root, PAGE_SIZE):
        # mmu_check_root() asks for a triple fault before L2 has been entered.
        lost = knobs.triple_fault_in_l2 == "userspace"
        return ("nCR3 without memory",) if lost else ()
    vmmcall = intercepted(control, Intercept.INTERCEPT_VMMCALL)
    repeated = knobs.vmmcall_in_l2 == "repeated" and not vmmcall
    return ("VMMCALL not intercepted",) if repeated else ()


def _names(checks: list[Check]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(check.name for check in checks))
