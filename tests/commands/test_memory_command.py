"""`nsvm memory` on a host that answers what is written down: words, JSON, statuses."""

import json

import pytest
from click.testing import CliRunner

from harness.commands import memory
from harness.errors import HostError, HostLost
from harness.host.session import CallResult

HOST = {"kind": "emulated", "kernel_release": "6.1.0-fake", "kernel_origin": "forged",
        "silicon": "emulated (QEMU 9)"}  # fmt: skip
READING = {
    "off_bytes_per_vcpu": 0.0,
    "on_bytes_per_vcpu": 12288.0,
    "delta_bytes_per_vcpu": 12288.0,
    "resolution_bytes": 0.0,
}
MEASURED = {
    "vcpus": 8, "vms": 1, "path": "wrmsr", "rounds": 3,
    "probes": {"page_alloc": READING, "memcg": {**READING, "resolution_bytes": 2048.5}},
    "memcg_source": "memory.stat",
    "call_sites": [{"function": "svm_allocate_nested", "order": 0, "count": 8,
                    "via": ["svm_set_efer", "kvm_set_msr_common", "kvm_vcpu_ioctl"]}],
    "model": {"policy": "on-demand", "delta_bytes_per_vcpu": 12288,
              "running_kernel_fits": "on-demand"},
    "verdict": "PASS",
}  # fmt: skip


class FakeHost:
    def __init__(self, answer):
        self.answer, self.asked, self.closed = answer, {}, False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed = True

    def start(self):
        return self

    def describe(self):
        return HOST

    def call(self, target, *, timeout_s, **kwargs):
        self.asked = {"target": target, "timeout_s": timeout_s, **kwargs}
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def measure(monkeypatch):
    def run(answer, *arguments):
        host = FakeHost(answer)
        monkeypatch.setattr(memory, "make_host", lambda choice, log: host)
        return CliRunner().invoke(memory.command, ["--host", "emulated", *arguments]), host

    return run


def returned(**changes):
    more = {key: changes.pop(key) for key in ("kmsg", "tainted") if key in changes}
    return CallResult("return", value={**MEASURED, **changes}, seconds=1.5, **more)


def failed(kind, *bases, message="x: expected 1, saw 2"):
    error = {"type": kind, "bases": [kind, *bases], "message": message}
    return CallResult("raise", error=error)


def test_all_that_was_measured_is_shown(measure):
    result, host = measure(returned())
    assert result.exit_code == 0
    texts = ["6.1.0-fake", "12288", "± 2048.5", "this kernel fits: on-demand", "verdict  PASS"]
    for text in [*texts, "8 x order 0  svm_allocate_nested ← svm_set_efer"]:
        assert text in result.output
    assert host.closed


def test_options_arrive(measure):
    sizes = ["--vcpus", "2", "--vms", "3", "--rounds", "4"]
    _, host = measure(returned(), *sizes, "--path", "sregs", "--timeout", "5")
    assert host.asked == {
        "target": "harness.inside:measure_nested_memory",
        "timeout_s": 5.0,
        **{"vcpus": 2, "vms": 3, "path": "sregs", "rounds": 4},
    }


def test_json_goes_to_a_file_or_alone_to_stdout(measure, tmp_path):
    file = tmp_path / "out.json"
    result, _ = measure(returned(), "--json", str(file))
    report = json.loads(file.read_text())
    assert report == {"host": HOST, **MEASURED, "seconds": 1.5}
    assert "verdict  PASS" in result.output
    result, _ = measure(returned(), "--json", "-")
    assert json.loads(result.stdout) == report


@pytest.mark.parametrize(
    ("answer", "status", "text"),
    [
        (returned(verdict="FAIL"), 1, "verdict  FAIL"),
        (failed("ScenarioFailure", "NsvmError"), 1, "verdict  FAIL: x: expected 1, saw 2"),
        (failed("Unsupported", "NsvmError", message="svm=0"), 4, "verdict  SKIP: svm=0"),
        (returned(kmsg=[{"text": "WARNING: CPU: 0"}]), 1, "kernel log: WARNING: CPU: 0"),
        (returned(tainted=(0, 1 << 9)), 1, "verdict  FAIL"),
        (returned(tainted=(0, 1 << 12)), 0, "verdict  PASS"),
    ],
)
def test_the_exit_status_is_the_verdicts(measure, answer, status, text):
    result, _ = measure(answer)
    assert (result.exit_code, text in result.output) == (status, True), result.output


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (
            failed("HostError", "NsvmError", message="no tracefs"),
            HostError,
            "HostError: no tracefs",
        ),
        (failed("KeyError", message="'x'"), HostError, "KeyError: 'x'"),
        (CallResult("timeout"), HostError, "measuring nested-state memory: timeout"),
        (HostLost("it is gone"), HostLost, "it is gone"),
    ],
)
def test_what_could_not_be_measured_is_an_error_and_ends_the_host(measure, answer, error, text):
    result, host = measure(answer)
    assert isinstance(result.exception, error)
    assert text in str(result.exception)
    assert host.closed


def test_a_kernel_that_fits_no_policy_is_a_finding(measure):
    model = {**MEASURED["model"], "running_kernel_fits": None}
    result, _ = measure(returned(model=model, verdict="FAIL"))
    assert "this kernel fits: no known policy" in result.output
