"""What kernels do differently with nested SVM state: one knob for each behaviour.

A kernel version is a named setting of the knobs (`SETTINGS`), nothing more: the model asks for a
knob, never for a version. `APM` is the manual's own answer, where it has one. Every knob says in
`what` which behaviour it decides, what each value means, and where in the kernel it is decided.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Final, Literal, get_args, get_type_hints

from harness.model.allocation import Policy


def _knob(what: str, source: str, **values: str) -> Any:
    return field(metadata={"what": what, "source": source, "values": values})


@dataclass(frozen=True, kw_only=True)
class Knobs:
    """One answer for every behaviour in which kernels differ."""

    # Allocation and EFER

    allocation: Literal[Policy.EAGER, Policy.ON_DEMAND_V1, Policy.ON_DEMAND] = _knob(
        "when nested state is allocated",
        "svm_set_efer(), svm_allocate_nested(); commit 2fcf4876ada8 (5.10)",
        EAGER="with the vCPU",
        ON_DEMAND_V1="when EFER.SVME is set, and one page more to cache vmcb12",
        ON_DEMAND="when EFER.SVME is set",
    )
    alloc_failure: Literal["gp", "enomem"] = _knob(
        "a guest's WRMSR of EFER.SVME when memory is short; all kernels from 5.10 on have enomem",
        "kvm_emulate_wrmsr(), set_efer(); gp: the series as they were posted",
        gp="raises #GP",
        enomem="ends KVM_RUN with ENOMEM",
    )
    gif_on_svme_clear: Literal["set", "kept"] = _knob(
        "GIF when EFER.SVME is cleared",
        "svm_set_efer(); svm_leave_nested()",
        set="becomes 1",
        kept="stays as it was, and becomes 1 only if guest mode was left",
    )
    svme_clear_in_l2: Literal["back to L1", "shutdown"] = _knob(
        "L2 clears EFER.SVME, not intercepted",
        "svm_set_efer(), svm_leave_nested()",
        **{
            "back to L1": "L1 goes on with L2's registers",
            "shutdown": "guest mode is left and L1 gets a triple fault",
        },
    )
    efer_unchanged: Literal["nothing", "leave"] = _knob(
        "EFER is written with SVME=0 as it was",
        "svm_set_efer(); up to 5.9 SVME=0 always left nested mode and set GIF",
        nothing="nested state is not touched",
        leave="guest mode is left and GIF becomes 1",
    )
    sregs_checks_cr0: bool = _knob(
        "KVM_SET_SREGS checks CR0",
        "kvm_is_valid_sregs(), kvm_is_valid_cr0()",
        false="any value is taken",
        true="CR0[63:32], NW without CD and PG without PE are EINVAL",
    )
    sregs_checks_efer: bool = _knob(
        "KVM_SET_SREGS checks EFER against the guest's CPUID",
        "kvm_is_valid_sregs(), __set_sregs_common()",
        false="any value is taken",
        true="what the guest must not set is EINVAL",
    )

    stgi_without_svme: Literal["executes", "#UD once", "#UD"] = _knob(
        "STGI and CLGI while EFER.SVME is 0, with vGIF",
        "init_vmcb(), svm_recalc_instruction_intercepts(), svm_set_gif()",
        executes="work, for KVM does not intercept them",
        **{
            "#UD once": "raise #UD, until KVM_SET_NESTED_STATE sets GIF and STGI works",
            "#UD": "raise #UD",
        },
    )
    vmmcall_in_l2: Literal["repeated", "#UD"] = _knob(
        "VMMCALL in L2 that L1 does not intercept",
        "recalc_intercepts(), em_hypercall(), emulator_fix_hypercall()",
        repeated="is patched with itself and executed again, for ever",
        **{"#UD": "raises #UD"},
    )

    # What is kept of vmcb12

    save_area: Literal["uncached", "cached page", "checked fields", "all fields"] = _knob(
        "what VMRUN reads of vmcb12's save area once, before its checks",
        "nested_copy_vmcb_save_to_cache()",
        uncached="nothing: it is checked and loaded from the guest's memory",
        **{
            "cached page": "all, into a page",
            "checked fields": "the fields that it checks",
            "all fields": "all fields that it loads",
        },
    )
    clean_bits: Literal["ignored", "cache", "vmcb02"] = _knob(
        "vmcb12's clean bits",
        "nested_vmcb02_prepare_save(); series v1: nested_vmcb12 cache",
        ignored="are ignored",
        cache="decide what is read into the cache",
        vmcb02="decide what is loaded into vmcb02",
    )
    nested_state_control_bytes: Literal[256, 1024] = _knob(
        "bytes of the control area that KVM_GET_NESTED_STATE gives; no kernel shows it, for all"
        " clear the whole page first and have nothing to give beyond byte 256",
        "svm_get_nested_state(): clear_user(); nested_copy_vmcb_cache_to_control()",
        **{"256": "of struct vmcb_control_area as it was", "1024": "the whole area"},
    )
    next_rip_cached: bool = _knob(
        "nRIP (next_rip) of vmcb12, in what KVM_GET_NESTED_STATE gives",
        "copy_vmcb_control_area(), __nested_copy_vmcb_control_to_cache()",
        false="is 0",
        true="is that of vmcb12",
    )
    control_sanitised: bool = _knob(
        "reserved bits of int_vector, int_state, event_inj, tlb_ctl, and intercepts L1 lacks",
        "__nested_copy_vmcb_control_to_cache()",
        false="are kept in the cache",
        true="are cleared in the cache",
    )

    # VMRUN

    l1_state: Literal["hsave page", "vmcb01"] = _knob(
        "where L1's state is while L2 runs",
        "struct svm_nested_state: hsave, vmcb02; svm_switch_vmcb()",
        **{
            "hsave page": "in a page of KVM's; after a forced leave L1 has L2's segments",
            "vmcb01": "in a VMCB of its own; after a forced leave L1 has its own segments",
        },
    )
    vmrun_forces_fixed_bits: bool = _knob(
        "bits of DR6, DR7 and RFLAGS that are always 1, at VMRUN",
        "nested_vmcb02_prepare_save(): DR6_ACTIVE_LOW, DR7_FIXED_1, X86_EFLAGS_FIXED",
        false="are loaded as they are",
        true="are set",
    )
    lma_without_lme: Literal["kept", "cleared"] = _knob(
        "EFER.LMA set and LME clear in vmcb12, at VMRUN",
        "nested_vmcb02_prepare_save()",
        kept="LMA is loaded: KVM takes L2 for one in long mode",
        cleared="LMA is cleared: KVM knows that L2 has PAE paging, and checks its PDPTEs",
    )
    vmrun_needs_hsave: bool = _knob(
        "VMRUN while VM_HSAVE_PA is 0",
        "nested_svm_vmrun()",
        false="runs L2",
        true="raises #GP",
    )
    vmrun_checks_rax: bool = _knob(
        "KVM's own check of VMRUN's RAX",
        "nested_svm_vmrun(), vmrun_interception()",
        false="the low 12 bits are ignored",
        true="an address that is not of a page, or beyond MAXPHYADDR, raises #GP",
    )
    vmrun_unmappable: Literal["gp", "internal error"] = _knob(
        "VMRUN of a legal address without memory",
        "nested_svm_vmrun(), kvm_vcpu_map()",
        gp="raises #GP",
        **{"internal error": "ends KVM_RUN with KVM_EXIT_INTERNAL_ERROR, suberror EMULATION"},
    )
    vmrun_refused_gif: Literal["kept", "cleared"] = _knob(
        "GIF after a VMRUN that was refused by its checks",
        "nested_svm_vmrun()",
        kept="as before",
        cleared="0, as after every #VMEXIT",
    )
    vmrun_refused_exit_code: Literal["32 bits", "64 bits"] = _knob(
        "the exit code of a VMRUN that was refused by its checks",
        "nested_svm_vmrun(); SVM_EXIT_ERR",
        **{"32 bits": "-1 in the low half only", "64 bits": "-1 in all 64 bits"},
    )
    vmrun_drops_l1_events: bool = _knob(
        "L1's pending exception and interrupt at VMRUN; the #DB of RFLAGS.TF is the only one that"
        " can be, and is lost on all: with what a run of the guest clears before nested_run_pending"
        " lets it in (6.1, 6.12), or not asked for (7.3)",
        "nested_svm_vmrun(): kvm_clear_exception_queue() (5.10), kvm_skip_emulated_instruction();"
        " svm_complete_interrupts(); svm_skip_emulated_instruction() (7.3)",
        false="are kept",
        true="are dropped",
    )
    event_inj_after_exit: Literal["written", "cleared"] = _knob(
        "EVENTINJ of vmcb12 after #VMEXIT or a refused VMRUN",
        "nested_svm_vmexit(), nested_svm_vmrun()",
        written="is written from the cache; a refused VMRUN leaves it",
        cleared="is 0",
    )
    tlb_ctl_after_exit: Literal["written", "kept"] = _knob(
        "TLB_CONTROL of vmcb12 after #VMEXIT",
        "nested_svm_vmexit()",
        written="is written from the cache",
        kept="is not written",
    )
    pause_filter_after_exit: Literal["written", "kept"] = _knob(
        "PAUSE filter count and threshold of vmcb12 after #VMEXIT",
        "nested_svm_vmexit()",
        written="are written",
        kept="are not written",
    )
    vmexit_unmappable: Literal["stays in L2", "shutdown"] = _knob(
        "#VMEXIT while vmcb12 has no memory",
        "nested_svm_vmexit(), kvm_vcpu_map()",
        **{
            "stays in L2": "L2 gets #GP and goes on",
            "shutdown": "guest mode is left, L1 shuts down",
        },
    )
    triple_fault_in_l2: Literal["userspace", "intercept"] = _knob(
        "a triple fault that KVM synthesises while L2 runs",
        "nested_svm_triple_fault()",
        userspace="is KVM_EXIT_SHUTDOWN whatever L1 intercepts",
        intercept="is #VMEXIT SHUTDOWN if L1 intercepts that",
    )
    intercepted_smi_without_gif: Literal["endless", "held"] = _knob(
        "an SMI that L1 intercepts comes while L2 has GIF=0",
        "svm_smi_allowed()",
        endless="KVM_RUN enters L2 and leaves it at once, for ever",
        held="L2 goes on, the SMI waits for GIF",
    )

    # The checks of vmcb12

    checks_cr0_high: bool = _knob(
        "CR0[63:32] of vmcb12 at VMRUN", "__nested_vmcb_check_save()",
        false="left to the CPU", true="must be 0",
    )  # fmt: skip
    checks_cs_l_d: bool = _knob(
        "CS.L and CS.D both set, in long mode, in vmcb12", "__nested_vmcb_check_save()",
        false="left to the CPU", true="refused",
    )  # fmt: skip
    checks_efer_bits: bool = _knob(
        "EFER bits that L1's CPUID does not offer, in vmcb12",
        "__nested_vmcb_check_save(), kvm_valid_efer()",
        false="not checked", true="refused",
    )  # fmt: skip
    checks_nested_cr3: bool = _knob(
        "nCR3 beyond MAXPHYADDR with nested paging", "nested_svm_check_controls()",
        false="not checked", true="refused",
    )  # fmt: skip
    checks_bitmap_addresses: bool = _knob(
        "MSRPM and IOPM beyond MAXPHYADDR", "nested_svm_check_bitmap_pa()",
        false="not checked", true="refused",
    )  # fmt: skip
    checks_v_nmi: bool = _knob(
        "V_NMI enabled without the NMI intercept", "__nested_vmcb_check_controls()",
        false="not checked", true="refused",
    )  # fmt: skip
    checks_event_inj: bool = _knob(
        "EVENTINJ of a reserved type, or an exception without a vector",
        "nested_svm_check_event_inj()",
        false="not checked by KVM", true="refused",
    )  # fmt: skip
    np_without_cpuid: Literal["allowed", "cleared"] = _knob(
        "NP_ENABLE in vmcb12 while L1's CPUID has no NPT",
        "__nested_copy_vmcb_control_to_cache()",
        allowed="is honoured",
        cleared="is ignored",
    )

    # KVM_SET_NESTED_STATE

    set_state_restores_run_pending: bool = _knob(
        "KVM_STATE_NESTED_RUN_PENDING given to KVM_SET_NESTED_STATE", "svm_set_nested_state()",
        false="is lost", true="is restored",
    )  # fmt: skip
    set_state_gif_in_gm: Literal["ignored", "honoured"] = _knob(
        "KVM_STATE_NESTED_GIF_SET given together with GUEST_MODE", "svm_set_nested_state()",
        ignored="does nothing", honoured="sets GIF",
    )  # fmt: skip
    set_state_without_svme: Literal["only GIF_SET", "0 or GIF_SET"] = _knob(
        "flags that KVM_SET_NESTED_STATE takes while EFER.SVME is 0", "svm_set_nested_state()",
        **{"only GIF_SET": "exactly GIF_SET", "0 or GIF_SET": "none, or GIF_SET"},
    )  # fmt: skip
    set_state_checks_save: Literal["cr0.PG and efer.SVME", "as VMRUN", "as VMRUN and LMA"] = _knob(
        "L1's save area given to KVM_SET_NESTED_STATE", "svm_set_nested_state()",
        **{
            "cr0.PG and efer.SVME": "CR0.PG and EFER.SVME must be set",
            "as VMRUN": "is checked as by VMRUN, and CR0.PE and not RFLAGS.VM",
            "as VMRUN and LMA": "is checked as by VMRUN, and LMA needs LME",
        },
    )  # fmt: skip
    set_state_checks_cr3: bool = _knob(
        "a current CR3 that is illegal, at KVM_SET_NESTED_STATE with GUEST_MODE",
        "svm_set_nested_state(), nested_svm_load_cr3()",
        false="is taken", true="is EINVAL, after the vCPU went into guest mode",
    )  # fmt: skip
    pages_request: Literal["once", "until it succeeds"] = _knob(
        "L1's MSR permission map cannot be read at the first KVM_RUN after KVM_SET_NESTED_STATE",
        "svm_get_nested_state_pages(), KVM_REQ_GET_NESTED_STATE_PAGES",
        once="fails that KVM_RUN; the next one runs L2 without the merged map",
        **{"until it succeeds": "fails every KVM_RUN until it can be"},
    )  # fmt: skip
    nested_state_with_nested_0: Literal["handled", "einval"] = _knob(
        "KVM_GET/SET_NESTED_STATE with kvm_amd's nested=0", "svm_hardware_setup()",
        handled="work", einval="EINVAL",
    )  # fmt: skip

    # SMM

    smm_checks: Literal["lenient", "allocated", "nonzero efer", "svme", "svme and vmcb12"] = _knob(
        "what RSM asks of the save area before it goes back into L2",
        "svm_leave_smm(), svm_pre_leave_smm()",
        lenient="nothing",
        allocated="that nested state is allocated",
        svme="CPUID LM and SVM, and EFER.SVME in the save area",
        **{
            "nonzero efer": "CPUID LM and SVM, and any EFER but 0 in the save area",
            "svme and vmcb12": "CPUID LM and SVM, EFER.SVME, and a vmcb12 that VMRUN would take",
        },
    )
    rsm_checks: Literal["lenient", "strict", "strict with DR"] = _knob(
        "RSM with an EFER or DR6, DR7 that the guest must not have", "rsm_load_state_64()",
        lenient="ignores it",
        strict="fails for EFER; masks the high halves of DR6 and DR7",
        **{"strict with DR": "fails"},
    )  # fmt: skip
    rsm_reads_control: bool = _knob(
        "vmcb12's control area when RSM goes back into L2",
        "svm_pre_leave_smm(), svm_leave_smm(): nested_copy_vmcb_control_to_cache()",
        false="is not read: L2 goes on with what KVM had cached, without nested_cr3",
        true="is read again",
    )  # fmt: skip
    rsm_cr_high: Literal["ignored", "checked"] = _knob(
        "CR0[63:32] and CR4[63:32] in the save area, at RSM",
        "rsm_enter_protected_mode(); up to 6.1 through emulator_set_cr()",
        ignored="are ignored", checked="must be 0, else RSM fails",
    )  # fmt: skip
    rsm_rflags: Literal["32 bits", "64 bits"] = _knob(
        "RFLAGS[63:32] in the save area, at RSM", "rsm_load_state_64()",
        **{"32 bits": "are ignored", "64 bits": "are loaded"},
    )  # fmt: skip
    rsm_limits: Literal["as a descriptor", "as saved"] = _knob(
        "segment limits in the save area, at RSM",
        "rsm_load_seg_64(), rsm_load_seg_32(); up to 6.1 emulator_set_segment()",
        **{
            "as a descriptor": "keep 20 bits, which G scales: others than SMI has saved may come",
            "as saved": "are loaded",
        },
    )
    rsm_updates_mode: bool = _knob(
        "the emulator's mode behind RSM", "em_rsm(), emulator_recalc_and_set_mode()",
        false="is the handler's: in 64-bit mode only RIP is loaded whole, else RIP[31:0]",
        true="is that of what was loaded; RFLAGS.VM in long mode and a CS that is not present have"
        " none, and are an emulation failure",
    )  # fmt: skip
    rsm_cr3: Literal["in long mode", "checked"] = _knob(
        "an illegal CR3 in the save area, at RSM", "rsm_enter_protected_mode(), kvm_set_cr3()",
        **{"in long mode": "fails if the vCPU is in long mode by then, as only L2 is"},
        checked="fails",
    )  # fmt: skip
    pg_in_64_bit_mode: Literal["cleared", "kept"] = _knob(
        "CR0.PG clear in the save area, at RSM into 64-bit code of L2", "kvm_set_cr0()",
        cleared="is loaded, and clears EFER.LMA", kept="fails",
    )  # fmt: skip
    rsm_failure: Literal["internal error", "shutdown"] = _knob(
        "an RSM that fails", "em_rsm(), emulator_leave_smm()",
        shutdown="shuts the vCPU down",
        **{"internal error": "is an emulation failure, and leaves #UD queued"},
    )  # fmt: skip
    rsm_failure_in_guest_mode: Literal["in L2", "leaves"] = _knob(
        "an RSM that fails after it entered guest mode", "svm_leave_smm(), emulator_leave_smm()",
        leaves="leaves guest mode first", **{"in L2": "is L2's triple fault"},
    )  # fmt: skip
    rsm_sets_run_pending: bool = _knob(
        "RSM into L2", "svm_leave_smm()",
        false="is no VMRUN in flight", true="counts as a VMRUN that was not entered yet",
    )  # fmt: skip
    l1_state_in_smm: Literal["kernel", "VM_HSAVE_PA"] = _knob(
        "where L1's state is kept when an SMI interrupts L2",
        "svm_enter_smm(), svm_pre_enter_smm()",
        kernel="in the kernel, where it is lost when the VM is migrated",
        VM_HSAVE_PA="in the guest's host save page",
    )  # fmt: skip
    smi_in_l2_exit_code: Literal["stale", "0xf0000000"] = _knob(
        "the exit code in vmcb12 while an SMI that interrupted L2 is handled",
        "svm_enter_smm(), nested_svm_simple_vmexit(): SVM_EXIT_SW",
        stale="is that of the last exit", **{"0xf0000000": "is SVM_EXIT_SW"},
    )  # fmt: skip
    smi_in_l2_gif: Literal["set", "cleared"] = _knob(
        "GIF in SMM entered from L2", "nested_svm_vmexit(), svm_set_efer()",
        set="1, for EFER.SVME was cleared", cleared="0, from the #VMEXIT",
    )  # fmt: skip
    enter_smm_failure: Literal["ignored", "vm dead"] = _knob(
        "SMRAM or the host save page cannot be written when an SMI comes", "enter_smm()",
        ignored="is not noticed", **{"vm dead": "ends the VM: EIO from every ioctl"},
    )  # fmt: skip
    intr_shadow_in_smram: bool = _knob(
        "the interrupt shadow across an SMI", "enter_smm_save_state_64()",
        false="leaks into the handler, or is lost", true="is kept in SMRAM",
    )  # fmt: skip

    # Reset

    reset_leaves_nested: bool = _knob(
        "INIT while L2 runs", "kvm_vcpu_reset(), kvm_leave_nested()",
        false="forgets guest mode, and goes on by L2's nested page tables",
        true="leaves guest mode first",
    )  # fmt: skip

    def but(self, **changes: Any) -> Knobs:
        """Return these knobs with some of them turned."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Knob:
    """What a knob decides."""

    name: str
    what: str
    source: str
    values: tuple[Any, ...]
    words: Mapping[str, str]

    def in_words(self, value: object) -> str:
        """Return what a value means.

        Raises KeyError: the knob has no such value.
        """
        return self.words[self.key_of(value)]

    def key_of(self, value: object) -> str:
        """Return a value as text, fit for JSON: `words` and `value_of` take it."""
        return _key(value)

    def value_of(self, key: str) -> Any:
        """Return the value that `key_of` names so.

        Raises KeyError: the knob has no such value.
        """
        return {_key(value): value for value in self.values}[key]


def _key(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return value.name if isinstance(value, Policy) else str(value)


def _declared() -> dict[str, Knob]:
    hints = get_type_hints(Knobs)
    knobs = {}
    for each in fields(Knobs):
        kind = hints[each.name]
        if kind is bool:
            values: tuple[Any, ...] = (False, True)
        else:
            values = get_args(kind)
        words = each.metadata["values"]
        if each.default is not MISSING or {_key(value) for value in values} != set(words):
            raise TypeError(
                f"knob {each.name}: its words {list(words)} are not its values {values}"
            )
        knobs[each.name] = Knob(
            each.name, each.metadata["what"], each.metadata["source"], values, words
        )
    return knobs


KNOBS: Final[Mapping[str, Knob]] = _declared()
"""Every knob by name."""

#: As its newest stable release has it (5.10.262); 5.10.223 had vmrun_refused_gif="kept" and
#: vmrun_refused_exit_code="32 bits".
_V5_10: Final = Knobs(
    allocation=Policy.ON_DEMAND,
    alloc_failure="enomem",
    gif_on_svme_clear="set",
    svme_clear_in_l2="back to L1",
    efer_unchanged="nothing",
    sregs_checks_cr0=False,
    sregs_checks_efer=False,
    stgi_without_svme="executes",
    vmmcall_in_l2="repeated",
    save_area="uncached",
    clean_bits="ignored",
    nested_state_control_bytes=256,
    next_rip_cached=False,
    control_sanitised=False,
    l1_state="hsave page",
    vmrun_forces_fixed_bits=False,
    lma_without_lme="kept",
    vmrun_needs_hsave=False,
    vmrun_checks_rax=False,
    vmrun_unmappable="gp",
    vmrun_refused_gif="cleared",
    vmrun_refused_exit_code="64 bits",
    vmrun_drops_l1_events=True,
    event_inj_after_exit="written",
    tlb_ctl_after_exit="written",
    pause_filter_after_exit="written",
    vmexit_unmappable="stays in L2",
    triple_fault_in_l2="userspace",
    intercepted_smi_without_gif="endless",
    checks_cr0_high=False,
    checks_cs_l_d=False,
    checks_efer_bits=False,
    checks_nested_cr3=False,
    checks_bitmap_addresses=False,
    checks_v_nmi=False,
    checks_event_inj=False,
    np_without_cpuid="allowed",
    set_state_restores_run_pending=False,
    set_state_gif_in_gm="ignored",
    set_state_without_svme="only GIF_SET",
    set_state_checks_save="cr0.PG and efer.SVME",
    set_state_checks_cr3=False,
    pages_request="once",
    nested_state_with_nested_0="handled",
    smm_checks="svme",
    rsm_checks="strict",
    rsm_reads_control=False,
    rsm_cr_high="ignored",
    rsm_rflags="32 bits",
    rsm_limits="as a descriptor",
    rsm_updates_mode=False,
    rsm_cr3="in long mode",
    pg_in_64_bit_mode="cleared",
    rsm_failure="internal error",
    rsm_failure_in_guest_mode="in L2",
    rsm_sets_run_pending=False,
    l1_state_in_smm="kernel",
    smi_in_l2_exit_code="stale",
    smi_in_l2_gif="set",
    enter_smm_failure="ignored",
    intr_shadow_in_smram=False,
    reset_leaves_nested=False,
)

_FIRST_5_10: Final = _V5_10.but(vmrun_refused_gif="kept", vmrun_refused_exit_code="32 bits")
_V5_9: Final = _FIRST_5_10.but(allocation=Policy.EAGER, efer_unchanged="leave")
_BEFORE_5_9: Final = _V5_9.but(smm_checks="lenient", rsm_checks="lenient")
_SERIES_V1: Final = _BEFORE_5_9.but(
    allocation=Policy.ON_DEMAND_V1,
    efer_unchanged="nothing",
    alloc_failure="gp",
    save_area="cached page",
    clean_bits="cache",
    smm_checks="allocated",
)
_SERIES_V2: Final = _FIRST_5_10.but(smm_checks="nonzero efer", alloc_failure="gp")

_V6_1: Final = _V5_10.but(
    sregs_checks_cr0=True,
    l1_state="vmcb01",
    rsm_reads_control=True,
    next_rip_cached=True,
    vmrun_forces_fixed_bits=True,
    save_area="checked fields",
    clean_bits="vmcb02",
    nested_state_control_bytes=1024,
    vmrun_needs_hsave=True,
    vmrun_drops_l1_events=False,
    pause_filter_after_exit="kept",
    triple_fault_in_l2="intercept",
    intercepted_smi_without_gif="held",
    checks_cr0_high=True,
    checks_cs_l_d=True,
    checks_efer_bits=True,
    checks_nested_cr3=True,
    checks_bitmap_addresses=True,
    set_state_restores_run_pending=True,
    set_state_gif_in_gm="honoured",
    set_state_checks_save="as VMRUN",
    set_state_checks_cr3=True,
    rsm_checks="strict with DR",
    rsm_updates_mode=True,
    rsm_cr3="checked",
    pg_in_64_bit_mode="kept",
    rsm_failure="shutdown",
    rsm_sets_run_pending=True,
    l1_state_in_smm="VM_HSAVE_PA",
    smi_in_l2_exit_code="0xf0000000",
    reset_leaves_nested=True,
)

#: As its newest stable release has it (6.12.117); 6.12.107 had sregs_checks_efer=False and
#: pages_request="once".
_V6_12: Final = _V6_1.but(
    sregs_checks_efer=True,
    lma_without_lme="cleared",
    vmmcall_in_l2="#UD",
    event_inj_after_exit="cleared",
    tlb_ctl_after_exit="kept",
    checks_v_nmi=True,
    pages_request="until it succeeds",
    smm_checks="svme and vmcb12",
    rsm_cr_high="checked",
    rsm_rflags="64 bits",
    rsm_limits="as saved",
    rsm_failure_in_guest_mode="leaves",
    enter_smm_failure="vm dead",
    intr_shadow_in_smram=True,
)

_V7_3: Final = _V6_12.but(
    gif_on_svme_clear="kept",
    svme_clear_in_l2="shutdown",
    stgi_without_svme="#UD once",
    save_area="all fields",
    control_sanitised=True,
    vmrun_checks_rax=True,
    vmrun_unmappable="internal error",
    vmexit_unmappable="shutdown",
    checks_event_inj=True,
    np_without_cpuid="cleared",
    set_state_without_svme="0 or GIF_SET",
    set_state_checks_save="as VMRUN and LMA",
    nested_state_with_nested_0="einval",
    smi_in_l2_gif="cleared",
)

SETTINGS: Final[Mapping[str, Knobs]] = {
    "before 5.9": _BEFORE_5_9,
    "5.9": _V5_9,
    "series v1": _SERIES_V1,
    "series v2": _SERIES_V2,
    "5.10": _V5_10,
    "6.1": _V6_1,
    "6.12": _V6_12,
    "7.3": _V7_3,
}
"""Kernels, and the two series as they were posted, by name; oldest first."""


def differing(one: Knobs, other: Knobs) -> list[Knob]:
    """Return the knobs that two settings have turned differently."""
    return [knob for name, knob in KNOBS.items() if getattr(one, name) != getattr(other, name)]
