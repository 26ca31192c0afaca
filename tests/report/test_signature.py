"""The same failure has the same name, another one has not."""

import pytest

from harness.report.run_record import CaseRecord
from harness.report.signature import signature, splat
from harness.report.verdict import Verdict


def failed(reason):
    return CaseRecord("a", Verdict.FAIL, reason)


WARNING = (
    "kernel: [   12.345678] WARNING: CPU: 0 PID: 110 at arch/x86/kvm/svm/nested.c:957"
    " nested_svm_vmexit+0x6d1/0x740 [kvm_amd]"
)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (WARNING, WARNING.replace("CPU: 0 PID: 110", "CPU: 1 PID: 9").replace("957", "961")),
        (WARNING, WARNING.replace("0x6d1/0x740", "0x6e1/0x750").replace("12.345678", "99.000001")),
        ("did not stop within 5 s: x", "did not stop within 15.5 s: x"),
        ("at 0xffff888012345678", "at 0xffff888087654321"),
        ("at ffff888012345678", "at ffff888087654321"),
        ("rip: expected 0x238000, saw 0x238209", "rip: expected 0x238000, saw 0x238163"),
        ("x: expected 1, saw 2\nmore", "x: expected 1, saw 2\nother"),
    ],
)
def test_what_differs_each_time_is_left_out(one, other):
    assert signature(failed(one)) == signature(failed(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x: expected 1, saw 2", "x: expected 1, saw 3"),
        ("x: expected 1, saw 2", "y: expected 1, saw 2"),
        ("efer: expected 0x1d00, saw 0x1500", "efer: expected 0x1d00, saw 0xd00"),
        (WARNING, WARNING.replace("nested_svm_vmexit", "nested_svm_vmrun")),
    ],
)
def test_another_failure_is_another(one, other):
    assert signature(failed(one)) != signature(failed(other))


def test_the_verdict_is_part_of_it():
    assert signature(failed("x")) != signature(CaseRecord("a", Verdict.ERROR, "x"))


def test_a_kernels_report_is_cut_out_of_its_log():
    said = WARNING.removeprefix("kernel: ")
    log = f"before\n--[ cut here ]--\n{said}\nCall Trace:\n---[ end trace 0 ]---\nafter"
    assert splat(failed(WARNING), log).splitlines() == log.splitlines()[1:5]
    assert splat(failed("x: expected 1, saw 2"), log) == ""
    assert splat(failed(WARNING), "another log") == said


def test_a_report_without_an_end_is_cut_off():
    log = "\n".join([WARNING.removeprefix("kernel: ")] * 500)
    assert len(splat(failed(WARNING), log).splitlines()) == 60
