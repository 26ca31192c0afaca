import json

import pytest
from rich.console import Console

from harness.bench.ratios import Comparison, Pair
from harness.bench.suite import Report
from harness.bench.table import as_json, rate_text, share_text, show, time_text


def shown(report, width=80):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        show(report, console)
        return console.export_text()


def row(name, host, against, ours_s, theirs_s, **more):
    return Comparison(name, host, against, pairs=[Pair(ours_s, theirs_s)] * 2, **more)


REPORT = Report(
    hosts=[{"kind": "local", "kernel_release": "6.18", "silicon": "AMD [EPYC]"}],
    rows=[
        row("get_vcpu_state", "local", "C", 4.0, 3.0, count=1000),
        row("get_vcpu_state", "emulated", "C", 400.0, 3.0, count=1000),
        row("start_warm", "emulated", "bare QEMU", 0.5, 0.25),
        row("memory_start", "emulated", "memory", 4.0, 1.0, is_part=True),
    ],
    skipped=[{"host": "local", "name": "get_msrs", "reason": "KVM_GET_MSRS: EINVAL"}],
    errors=["emulated host: [it] hangs"],
)


def test_every_row_is_in_the_table_of_its_host_and_counterpart():
    lines = shown(REPORT).splitlines()
    table = ""
    found = {}
    for line in lines:
        if " host: " in line:
            table = line.strip()
        elif line.startswith("│"):
            found[table, line.split()[1]] = [cell.strip() for cell in line.split("│")[2:-1]]
    title = "{} host: speed as a share of that of {}".format
    assert found == {
        (title("local", "C"), "get_vcpu_state"): ["0.75", "0.75..0.75", "4.00 ms", "3.00 ms"],
        (title("emulated", "C"), "get_vcpu_state"): [
            "0.007", "0.007..0.007", "400.00 ms", "3.00 ms",
        ],
        (title("emulated", "bare QEMU"), "start_warm"): [
            "0.50", "0.50..0.50", "500.00 ms", "250.00 ms",
        ],
        ("emulated host: shares of memory", "memory_start"): ["0.25", "0.25..0.25", "1.00 s"],
    }  # fmt: skip


def test_what_has_no_row_is_said():
    text = shown(REPORT, width=200)
    assert "skipped: get_msrs on local: KVM_GET_MSRS: EINVAL" in text
    assert "error: emulated host: [it] hangs" in text
    assert "local: kernel 6.18, AMD [EPYC]" in text


RATES = Report(
    rows=[
        row("proxy_batched_l1", "local", "single L1", 1.0, 1000.0, unit="operations"),
        row("proxy_vmrun_l2_l3", "local", "single L2", 0.025, 0.005, unit="VMRUNs", note="slow"),
        row("run_exit", "local", "C", 2.0, 1.0),
    ],
    skipped=[
        {"host": "local", "name": "proxy_single_l2", "reason": "no SVM"},
        {"host": "local", "name": "proxy_single_l3", "reason": "no SVM"},
        {"host": "emulated", "name": "proxy_single_l3", "reason": "no SVM"},
    ],
)


def test_rates_are_one_table_with_each_rows_counterpart_and_note():
    rates, _, others = shown(RATES).partition("speed as a share of that of C")
    assert "local host: operations and VMRUNs per second" in rates
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in rates.splitlines()]
    assert [found for found in rows if found] == [
        ["proxy_batched_l1", "1,000", "1,000..1,000", "1", "single L1", "0.001"],
        ["proxy_vmrun_l2_l3", "0.20", "0.20..0.20", "40", "single L2", "200"],
    ]
    assert "proxy_vmrun_l2_l3: slow" in rates
    assert "run_exit" in others


def test_skips_for_one_reason_are_one_line():
    lines = [line.strip() for line in shown(RATES).splitlines() if "skipped" in line]
    assert lines == [
        "skipped: proxy_single_l2, proxy_single_l3 on local: no SVM",
        "skipped: proxy_single_l3 on emulated: no SVM",
    ]


@pytest.mark.parametrize(
    ("microseconds", "text"), [(2, "500,000"), (10_000, "100"), (30_000, "33.3"), (4e6, "0.25")]
)
def test_rates_have_the_digits_that_mean_something(microseconds, text):
    assert rate_text(microseconds) == text


def test_json_has_it_all():
    data = json.loads(json.dumps(as_json(REPORT, seconds=1.26)))
    assert [(b["host"], b["name"], b["share"]) for b in data["benchmarks"]] == [
        ("local", "get_vcpu_state", 0.75),
        ("emulated", "get_vcpu_state", 0.0075),
        ("emulated", "start_warm", 0.5),
        ("emulated", "memory_start", 0.25),
    ]
    assert data["skipped"] == REPORT.skipped
    assert data["errors"] == REPORT.errors
    assert data["hosts"] == REPORT.hosts
    assert data["seconds"] == 1.3


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0376, "0.038"), (0.0999, "0.100"), (0.1, "0.10"), (1.047, "1.05"), (1234.5, "1,234")],
)
def test_shares_keep_the_digits_that_mean_something(share, text):
    assert share_text(share) == text


@pytest.mark.parametrize(
    ("microseconds", "text"), [(0.234, "0.23 us"), (1500, "1.50 ms"), (2_345_000, "2.35 s")]
)
def test_times_have_a_fitting_unit(microseconds, text):
    assert time_text(microseconds) in (text, text.replace("2.35", "2.34"))
