"""Experiments that look at the host too: its memory, its module parameters. And what none shows."""

from __future__ import annotations

from harness.errors import HostError
from harness.facts import HostView
from harness.identify.btf import struct_members
from harness.identify.finding import Finding, Findings, either, experiment, unseen
from harness.identify.lab import GIF_SET, Lab, taken
from harness.model.allocation import policy_of
from harness.probe.page_alloc import PageAllocProbe
from kvm_ioctl.asm_kvm import kvm_nested_state
from kvm_ioctl.handles import Kvm, Vcpu


@experiment("allocation", deadline_s=60)
def pages_for_svme(kvm: Kvm) -> Findings:
    """Count the pages that setting EFER.SVME costs."""
    with Lab(kvm, svme=False) as lab:
        try:
            with PageAllocProbe() as probe:
                before = probe.read_bytes()
                lab.set_svme(True)
                delta = probe.read_bytes() - before
        except HostError as e:
            yield unseen("allocation", f"pages cannot be counted: {e}")
            return
    done = f"KVM_SET_SREGS of EFER.SVME: {delta} bytes allocated"
    yield Finding("allocation", policy_of(delta), done)


@experiment("nested_state_with_nested_0")
def nested_state_without_nested(kvm: Kvm) -> Findings:
    """Give nested state to a kvm_amd that was loaded with nested=0."""
    knob = "nested_state_with_nested_0"
    if HostView().param("kvm_amd", "nested") not in ("0", "N"):
        yield unseen(knob, "kvm_amd was loaded with nested=1")
        return
    with Lab(kvm, svme=False) as lab:
        state = kvm_nested_state(flags=GIF_SET, format=1, size=128)
        seen = taken(lab.vcpu.try_call(Vcpu.KVM_SET_NESTED_STATE, state))
        answers = {"taken": "handled", "EINVAL": "einval"}
        yield either(knob, seen, answers, "KVM_SET_NESTED_STATE with nested=0")


_CHECKED = "cr0"
_ONLY_LOADED = "rip"


@experiment("save_area")
def cached_fields(kvm: Kvm) -> Findings:
    """Look up what the kernel's cache of vmcb12's save area has room for.

    Its use shows only when another CPU writes vmcb12 in the middle of a VMRUN.
    """
    knob, name = "save_area", "vmcb_save_area_cached"
    try:
        members = struct_members("kvm_amd", name)
    except HostError as e:
        yield unseen(knob, f"{e}; else only a write to vmcb12 in the middle of VMRUN tells")
        return
    if members is None:
        yield unseen(knob, f"kvm_amd's type information has no struct {name}")
        return
    fields = ", ".join(members)
    value = "all fields" if _ONLY_LOADED in members else "checked fields"
    known = _CHECKED in members
    yield Finding(knob, value if known else None, f"struct {name} of kvm_amd's BTF: {fields}")


NOT_SHOWN = {
    "alloc_failure": "memory would have to be made short; scenario"
    " test_failed_allocation_is_refused_whole does so",
    "vmrun_drops_l1_events": "all lose the #DB of a VMRUN with RFLAGS.TF, and nothing else can be"
    " pending",
    "nested_state_control_bytes": "what is beyond byte 256 of the control area reads as 0 anyway",
    "rsm_reads_control": "the cross-check shows it",
    "intercepted_smi_without_gif": "the cross-check shows it",
    "rsm_cr_high": "the cross-check shows it",
    "rsm_rflags": "the tampering matrix shows it",
    "rsm_limits": "the tampering matrix shows it",
    "rsm_updates_mode": "the tampering matrix shows it",
    "rsm_cr3": "the tampering matrix shows it",
    "pg_in_64_bit_mode": "the tampering matrix shows it",
    "reset_leaves_nested": "the cross-check shows it",
}
"""Knobs that no experiment here shows, and why."""


@experiment(*NOT_SHOWN)
def not_shown(kvm: Kvm) -> Findings:
    """Say what cannot be seen."""
    for knob, why in NOT_SHOWN.items():
        yield unseen(knob, why)
