"""Lines of the kernel's log that decide a verdict, and lines that do not."""

import pytest

from harness.probe.kmsg import TAINTS, new_taints, splats

SPLATS = [
    "WARNING: CPU: 1 PID: 812 at arch/x86/kvm/svm/nested.c:1168 nested_svm_vmexit+0x1/0x2",
    "WARNING: possible circular locking dependency detected",
    "WARNING: suspicious RCU usage",
    "BUG: kernel NULL pointer dereference, address: 0000000000000010",
    "BUG: unable to handle page fault for address: ffffc90000e3f000",
    "watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [python3:68]",
    "BUG: sleeping function called from invalid context at mm/slab.h:494",
    "BUG: KASAN: slab-use-after-free in svm_free_nested+0x30/0x90 [kvm_amd]",
    "kernel BUG at arch/x86/kvm/svm/svm.c:1411!",
    "Oops: 0000 [#1] SMP NOPTI",
    "Oops: general protection fault, probably for non-canonical address: 0000 [#1] PREEMPT SMP",
    "general protection fault, probably for non-canonical address 0xdead000000000100: 0000 [#1]",
    "unchecked MSR access error: WRMSR to 0xc0000080 (tried to write 0x1d01) at rIP: 0xffff",
    "UBSAN: shift-out-of-bounds in arch/x86/kvm/svm/nested.c:12:3",
    "INFO: task python3:68 blocked for more than 120 seconds.",
    "BUG: Bad page state in process init  pfn:7532",
    "refcount_t: underflow; use-after-free.",
    "list_del corruption. prev->next should be ffff888, but was 0000",
    "Kernel panic - not syncing: sysrq triggered crash",
]

HARMLESS = [
    "SVM: TSC scaling supported",
    "kvm: Nested Virtualization enabled",
    "kvm_amd: Nested Paging enabled",
    "x86/cpu: debugging disabled",
    "kvm [812]: vcpu0, guest rIP: 0xfff0 disabled perfctr wrmsr: 0xc2 data 0xffff",
    "kvm: SMP vm created on host with unstable TSC; guest TSC will not be reliable",
    "mitigations: Speculative Store Bypass: Vulnerable",
    "Spectre V2 : WARNING (not a splat): Unprivileged eBPF is enabled",
    "init invoked oom-killer: gfp_mask=0x400cc0(GFP_KERNEL_ACCOUNT), order=1, oom_score_adj=-1000",
    "Memory cgroup out of memory: Killed process 70 (init)",
    "random: crng init done",
    "debug: OopsLess naming",
    "KASAN_like_name: nothing",
]


@pytest.mark.parametrize("line", SPLATS)
def test_a_splat_is_one(line):
    assert splats(["before", line, "after"]) == [line]


@pytest.mark.parametrize("line", HARMLESS)
def test_a_harmless_line_is_none(line):
    assert splats([line]) == []


def test_a_line_that_is_meant_is_excused_and_no_other():
    meant, other = SPLATS[0], SPLATS[3]
    assert splats([meant, other], benign=[r"nested_svm_vmexit"]) == [other]
    assert splats([meant], benign=[r"nothing like it"]) == [meant]


@pytest.mark.parametrize("bit", TAINTS)
def test_a_condemning_taint_that_is_new_is_named(bit):
    assert new_taints(0, 1 << bit) == [TAINTS[bit]]
    assert new_taints(1 << bit, 1 << bit) == []
    assert new_taints(1 << bit, 0) == []


@pytest.mark.parametrize("bit", [0, 12, 13, 15])
def test_other_taints_condemn_nobody(bit):
    """P(roprietary), O(ut of tree), unsigned E, K(live patch)."""
    assert new_taints(0, 1 << bit) == []
