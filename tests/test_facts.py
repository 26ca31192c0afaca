"""Facts: the answer, its evidence, and what to do, on hosts that are made up."""

import errno

import pytest
from fake_host import CGROUP_V1, FakeHost

from harness import facts
from harness.errors import HostError
from harness.facts import Fact, HostView

ALL = (*facts.KVM_FACTS, *facts.PROBE_FACTS)

NO_KVM = {"errnos": {"/dev/kvm": errno.ENOENT}, "modules": []}


@pytest.mark.parametrize("fact", ALL, ids=lambda fact: fact.__name__)
def test_all_hold_on_a_good_host_and_ask_for_nothing(fact):
    answer = fact(FakeHost())
    assert answer.holds
    assert answer.evidence
    assert answer.mend == ""


@pytest.mark.parametrize(
    ("fact", "changes", "evidence", "mend"),
    [
        (facts.x86_64, {"machine": "aarch64"}, "aarch64", "x86-64"),
        (facts.kvm_device, NO_KVM, "/dev/kvm: No such file", "--host emulated"),
        (facts.kvm_device, {"errnos": {"/dev/kvm": errno.ENODEV}}, "No such device", "kvm_amd"),
        (facts.kvm_api, NO_KVM, "/dev/kvm: No such file", "--host emulated"),
        (facts.kvm_api, {"api": 11}, "KVM_GET_API_VERSION=11", "--host emulated"),
        (facts.kvm_amd, {"modules": ["kvm_intel"]}, "modules: kvm_intel", "modprobe kvm_amd"),
        (facts.kvm_amd, {"modules": []}, "(none of KVM)", "modprobe kvm_amd"),
        (facts.svm, {"flags": "vmx"}, "no cpu flag svm", "firmware"),
        (facts.nested_svm, {"modules": ["kvm_intel"]}, "modules: kvm_intel", "--host emulated"),
        (facts.nested_svm, {"params": {"nested": "0"}}, "kvm_amd.nested=0", "nested=1"),
        (facts.nested_svm, {"params": {"nested": "N"}}, "kvm_amd.nested=N", "nested=1"),
        (
            facts.nested_svm,
            {"errnos": {"/dev/kvm": errno.ENOENT}},
            "/dev/kvm: No such file",
            "--host emulated",
        ),
        (facts.nested_svm_off, {}, "kvm_amd.nested=1", "--host emulated"),
        (facts.nested_svm_off, NO_KVM, "no module kvm_amd", "--host emulated"),
        (facts.vgif, {"flags": "svm"}, "cpu flag vgif=0, kvm_amd.vgif=1", "a CPU"),
        (facts.vgif, {"params": {"vgif": "0"}}, "flag vgif=1, kvm_amd.vgif=0", "vgif=1"),
        (facts.nrip_save, {"modules": []}, "kvm_amd.nrips=(no such parameter)", "nrips=1"),
        (facts.nested_state, {"caps": {}}, "KVM_CAP_NESTED_STATE=0", "--host emulated"),
        (facts.nested_state, NO_KVM, "/dev/kvm: No such file", "--host emulated"),
        (facts.smm, {"caps": {}}, "KVM_CAP_X86_SMM=0", "--host emulated"),
        (facts.memory_controller, {"hierarchy": None}, "no memory controller", "cgroup v2"),
        (
            facts.memory_controller,
            {"files": {"/cg/cgroup.subtree_control": "cpu\n"}},
            "cgroup v2 at /cg, cgroup.subtree_control: cpu",
            "echo +memory > /cg/cgroup.subtree_control",
        ),
        (facts.memory_counters, {"hierarchy": None}, "no memory controller", "cgroup v2"),
        (
            facts.memory_counters,
            {"files": {"/cg/memory.stat": "anon 1\nkernel_stack 3\n"}},
            "no line 'kernel'",
            "6.1",
        ),
        (facts.memory_counters, {"files": {}}, "no /cg/memory.stat", "6.1"),
        (
            facts.tracefs,
            {"files": {"/proc/filesystems": "nodev\ttracefs\n"}},
            "not mounted",
            "mount -t tracefs tracefs /sys/kernel/tracing",
        ),
        (facts.tracefs, {"files": {}}, "no tracefs", "CONFIG_TRACING"),
        (facts.kprobe_events, {"files": {}}, "no tracefs", "CONFIG_TRACING"),
        (
            facts.kprobe_events,
            {"read_only": {"/sys/kernel/tracing/kprobe_events"}},
            "no /sys/kernel/tracing/kprobe_events",
            "CONFIG_KPROBE_EVENTS",
        ),
        (facts.kernel_log, {"errnos": {"/dev/kmsg": errno.ENOENT}}, "No such file", "container"),
    ],
)
def test_a_no_has_evidence_and_a_way_out(fact, changes, evidence, mend):
    answer = fact(FakeHost(**changes))
    assert not answer.holds
    assert evidence in answer.evidence
    assert mend in answer.mend


@pytest.mark.parametrize(
    ("fact", "changes", "error"),
    [
        (facts.kvm_device, {"errnos": {"/dev/kvm": errno.EACCES}}, "/dev/kvm: Permission denied"),
        (facts.nested_svm, {"errnos": {"/dev/kvm": errno.EPERM}}, "/dev/kvm: Operation not"),
        (facts.smm, {"errnos": {"/dev/kvm": errno.EBUSY}}, "/dev/kvm: Device or resource busy"),
        (facts.memory_controller, {"read_only": {"/cg"}}, "/cg: no permission"),
        (facts.tracefs, {"read_only": {"/sys/kernel/tracing/instances"}}, "no permission"),
        (facts.kernel_log, {"errnos": {"/dev/kmsg": errno.EPERM}}, "dmesg_restrict"),
    ],
)
def test_a_refusal_is_not_a_no(fact, changes, error):
    with pytest.raises(HostError, match=error):
        fact(FakeHost(**changes))


def test_another_vendors_device_need_not_be_opened_to_know_that_it_is_no_kvm_amd():
    host = FakeHost(modules=["kvm_intel"], errnos={"/dev/kvm": errno.EACCES})
    assert not facts.nested_svm(host).holds


@pytest.mark.parametrize("value", ["1", "Y"])
def test_both_spellings_of_a_boolean_parameter_are_yes(value):
    assert facts.nested_svm(FakeHost(params={"nested": value})).holds


@pytest.mark.parametrize("value", ["0", "N"])
def test_both_spellings_of_a_boolean_parameter_are_no(value):
    assert facts.nested_svm_off(FakeHost(params={"nested": value})).holds


def test_cgroup_v1_serves_too():
    host = FakeHost(**CGROUP_V1)
    assert facts.memory_controller(host) == Fact(True, "cgroup v1 at /cg")
    assert facts.memory_counters(host) == Fact(True, "/cg/memory.kmem.usage_in_bytes")


# The view of the machine that runs this


def test_a_file_that_is_not_there_is_none():
    assert HostView().read("/proc/no/such") is None


def test_a_module_that_is_not_there_has_no_parameters():
    assert HostView().param("no_such_module", "nested") is None


def test_a_file_that_cannot_be_read_is_the_hosts_fault(tmp_path):
    with pytest.raises(HostError, match=f"{tmp_path}: Is a directory"):
        HostView().read(tmp_path)


def test_a_device_that_is_not_kvm_is_the_hosts_fault(monkeypatch):
    monkeypatch.setattr(facts, "KVM_DEVICE", "/dev/null")
    assert facts.kvm_device(HostView()).holds
    with pytest.raises(HostError, match="this is not KVM"):
        facts.nested_state(HostView())


def test_open_errno_tells_why(tmp_path):
    view = HostView()
    assert view.open_errno("/dev/null") == 0
    assert view.open_errno(str(tmp_path / "none")) == errno.ENOENT
    assert view.open_errno(str(tmp_path)) == errno.EISDIR
