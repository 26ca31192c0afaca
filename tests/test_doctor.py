"""nsvm doctor: every answer is shown, and the right conclusions are drawn from them."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from fake_host import CGROUP_V1, FakeHost, FakeTools
from rich.console import Console

import harness.commands.doctor
from harness import doctor, facts, tools
from harness.doctor import collect, collect_inside, conclude_emulated, conclude_local, render
from harness.errors import HostError
from harness.facts import Answer, Fact, ask
from harness.host.apt_sources import DEBIAN_KEYRING
from harness.host.qemu import QEMU
from harness.runner.hosts import HostChoice, make_host
from harness.setup_machine import NEEDS

NO_SVM = {"flags": "vmx", "modules": ["kvm_intel"], "caps": {}}
REFUSING = {"errnos": {"/dev/kvm": 13}}


def test_every_fact_is_asked_once():
    asked = [*facts.KVM_FACTS, *facts.PROBE_FACTS, *doctor.TOOL_FACTS]
    assert len({fact.__name__ for fact in asked}) == len(asked)
    names = {answer.name for answer in collect(FakeHost(), FakeTools()).answers}
    assert names == {fact.__name__ for fact in asked}


@pytest.mark.parametrize("fact", doctor.TOOL_FACTS, ids=lambda fact: fact.__name__)
def test_all_tools_are_fine_on_a_good_machine(fact):
    answer = fact(FakeTools())
    assert answer.holds
    assert answer.mend == ""


@pytest.mark.parametrize(
    ("fact", "changes", "evidence", "mend"),
    [
        (tools.python, {"python_version": (3, 10, 9)}, "3.10.9", "3.11"),
        (tools.guest_compiler, {"build_error": "no C compiler"}, "no C compiler", "gcc"),
        (tools.qemu, {"missing": [QEMU]}, "not found", "qemu-system-x86"),
        (tools.qemu_svm, {"missing": [QEMU]}, "not found", "qemu-system-x86"),
        (
            tools.qemu_svm,
            {"qemu_answer": (1, f"{QEMU}: TCG doesn't support: vgif\nmore\n")},
            "TCG doesn't support: vgif",
            "7.2",
        ),
        (tools.qemu_svm, {"qemu_answer": (1, "")}, "status 1", "7.2"),
        (tools.setpriv, {"missing": ["setpriv"]}, "not found", "util-linux"),
        (tools.debian_packages, {"missing": ["dpkg-deb"]}, "dpkg-deb", "install --yes"),
        (
            tools.debian_packages,
            {"missing": [str(DEBIAN_KEYRING)]},
            str(DEBIAN_KEYRING),
            "debian-archive-keyring",
        ),
        (tools.kernels_cached, {"kernels": []}, "none", "first run"),
        (tools.cache_space, {"free_mib": 100}, "100 MiB free in /cache", "NSVM_CACHE"),
        (tools.memory_space, {"memory_mib": 500}, "500 MiB available", "end something"),
    ],
)
def test_a_missing_tool_has_evidence_and_a_way_out(fact, changes, evidence, mend):
    answer = fact(FakeTools(**changes))
    assert not answer.holds
    assert evidence in answer.evidence
    assert mend in answer.mend


def test_set_up_installs_what_doctor_misses():
    assert {QEMU, "setpriv", "cc", "objcopy", str(DEBIAN_KEYRING)} <= {need.what for need in NEEDS}


def test_a_command_that_hangs_or_is_not_there_is_the_machines_fault(monkeypatch):
    monkeypatch.setattr(tools, "_TIMEOUT_S", 0.2)
    with pytest.raises(HostError, match="sleep did not end"):
        tools.Tools().run(["sleep", "60"])
    with pytest.raises(HostError, match="no-such-command: No such file"):
        tools.Tools().run(["no-such-command"])


def test_a_refusal_is_an_answer_of_its_own():
    def refuse():
        raise HostError("/dev/kvm: Permission denied")

    assert ask("kvm_device", refuse) == Answer("kvm_device", None, "/dev/kvm: Permission denied")


def test_a_yes_asks_for_nothing():
    assert ask("x", lambda: Fact(True, "seen", "do this")).mend == ""


# Conclusions


@pytest.mark.parametrize(
    ("host", "holds", "evidence", "mend"),
    [
        ({}, True, "all that it takes is there", ""),
        (CGROUP_V1, True, "less what needs tracefs, kprobe_events", ""),
        (NO_SVM, False, "svm: no cpu flag svm; nested_svm: modules: kvm_intel", "firmware"),
        ({"params": {"nested": "0"}}, False, "kvm_amd.nested=0", "nested=1"),
        (REFUSING, None, "kvm_device: /dev/kvm: Permission denied", ""),
        ({**NO_SVM, **REFUSING}, False, "no cpu flag svm", "firmware"),
    ],
)
def test_the_local_host_is_judged_by_its_kvm(host, holds, evidence, mend):
    local = collect(FakeHost(**host), FakeTools()).local
    assert local.holds is holds
    assert evidence in local.evidence
    assert mend in local.mend


@pytest.mark.parametrize(
    ("machine", "holds", "evidence"),
    [
        ({}, True, "all that it takes is there"),
        ({"missing": [QEMU]}, False, f"qemu_svm: {QEMU} not found"),
        ({"build_error": "no C compiler"}, False, "guest_compiler: no C compiler"),
        ({"free_mib": 1}, False, "cache_space: 1 MiB free"),
        ({"missing": ["apt-get"]}, True, "all that"),
        ({"missing": ["apt-get"], "kernels": []}, False, "debian_packages: not there: apt-get"),
        ({"missing": ["apt-get"], "userland": False}, False, "debian_packages"),
        ({"kernels": [], "userland": False}, True, "all that"),
    ],
)
def test_the_emulated_host_is_judged_by_the_tools(machine, holds, evidence):
    emulated = collect(FakeHost(**NO_SVM), FakeTools(**machine)).emulated
    assert emulated.holds is holds
    assert evidence in emulated.evidence


@pytest.mark.parametrize("name", doctor.LOCAL_NEEDS)
@pytest.mark.parametrize("holds", [False, None])
def test_the_local_host_takes_each_of_its_needs(name, holds):
    assert conclude_local(answers(name, holds)).holds is holds


@pytest.mark.parametrize("name", doctor.EMULATED_NEEDS)
@pytest.mark.parametrize("holds", [False, None])
def test_the_emulated_host_takes_each_of_its_needs(name, holds):
    userland = Answer("userland", True, "")
    assert conclude_emulated(answers(name, holds), userland).holds is holds


def answers(changed, holds):
    good = collect(FakeHost(), FakeTools())
    return {a.name: a for a in good.answers} | {changed: Answer(changed, holds, "changed")}


def test_no_is_stronger_than_not_known():
    lacking = answers("svm", False) | {"kvm_device": Answer("kvm_device", None, "refused")}
    local = conclude_local(lacking)
    assert local.holds is False
    assert local.evidence == "svm: changed; kvm_device: refused"


# Output


def test_json_holds_every_answer():
    report = collect(FakeHost(**NO_SVM, **REFUSING), FakeTools())
    document = json.loads(report.to_json())
    assert [fact["name"] for fact in document["facts"]] == [a.name for a in report.answers]
    by_name = {fact.pop("name"): fact for fact in document["facts"]}
    assert by_name["kvm_amd"] == {
        "holds": False,
        "evidence": "modules: kvm_intel",
        "mend": facts.kvm_amd(FakeHost(**NO_SVM)).mend,
    }
    assert by_name["kvm_device"]["holds"] is None
    assert document["conclusions"]["local"]["holds"] is False
    assert document["conclusions"]["emulated"]["holds"] is True


def test_the_table_shows_answers_and_ways_out_as_they_are():
    # Square brackets would be markup to rich.
    report = collect(FakeHost(modules=["kvm_[red]"]), FakeTools(missing=[QEMU]))
    console = Console(width=200, file=io.StringIO())
    render(report, console)
    text = console.file.getvalue()
    assert "modules: kvm_[red]" in text
    assert f"-> {tools.qemu(FakeTools(missing=[QEMU])).mend}" in text
    for answer in report.answers:
        assert answer.name in text
    assert "local host usable for nested scenarios: no" in text
    assert "emulated host usable: no" in text


@pytest.mark.parametrize(
    ("host", "machine", "status"),
    [
        ({}, {"missing": [QEMU]}, 0),
        (NO_SVM, {}, 0),
        (NO_SVM, {"missing": [QEMU]}, 2),
        (REFUSING, {"missing": [QEMU]}, 2),
    ],
)
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_the_exit_status_says_whether_a_host_is_usable(monkeypatch, host, machine, status, options):
    monkeypatch.setattr(
        harness.commands.doctor, "collect", lambda: collect(FakeHost(**host), FakeTools(**machine))
    )
    assert CliRunner().invoke(harness.commands.doctor.command, options).exit_code == status


def test_it_works_on_this_machine_whatever_that_has(tmp_path):
    """The real thing, with nothing in the path and no home: all is answered or refused."""
    done = subprocess.run(
        [sys.executable, "-m", "harness", "doctor", "--json"],
        cwd=Path(doctor.__file__).parent.parent,
        env={"PATH": str(tmp_path), "HOME": "/dev/null"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr == ""
    document = json.loads(done.stdout)
    by_name = {fact["name"]: fact for fact in document["facts"]}
    assert by_name["qemu"]["holds"] is False
    assert by_name["cache_space"]["holds"] is None
    assert by_name["python"]["holds"] is True
    assert document["conclusions"]["emulated"]["holds"] is False


def test_an_emulated_host_that_does_not_start_is_part_of_the_report(monkeypatch):
    def fail(choice, log):
        raise HostError("no QEMU")

    monkeypatch.setattr(harness.commands.doctor, "make_host", fail)
    monkeypatch.setattr(
        harness.commands.doctor, "collect", lambda: collect(FakeHost(), FakeTools())
    )
    command = ["--host", "emulated", "--json"]
    result = CliRunner().invoke(harness.commands.doctor.command, command)
    [start] = json.loads(result.output)["inside"]["facts"]
    assert (start["holds"], start["evidence"]) == (None, "no QEMU")


#: What QEMU's TCG has not, of every release seen (5.10 to 7.3 of Linux on QEMU 7.2).
ABSENT_UNDER_TCG = {"nrip_save"}


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("kernel", "absent"),
    [("5.10", {"memory_counters"}), ("6.1", set())],
)
def test_the_emulated_host_has_what_scenarios_ask_for(kernel, absent):
    """The facts, asked of a real kvm_amd: all hold there, but for what is known to be absent."""
    with make_host(HostChoice("emulated", kernel)) as host:
        inside = collect_inside(host)
    assert inside.title.startswith(f"emulated host, kernel {kernel}.")
    lacking = {answer.name for answer in inside.answers if not answer.holds}
    # A later QEMU may have NRIP save.
    assert lacking - ABSENT_UNDER_TCG == absent
    assert len(inside.answers) == len(facts.KVM_FACTS + facts.PROBE_FACTS)
