"""A host without nested paging: what needs it is a SKIP with evidence, all else runs in shadow."""

import pytest
from nsvm_process import nsvm

from harness.report.results import read_results

pytestmark = pytest.mark.emulated


def test_what_needs_nested_paging_is_skipped(one_kernel, tmp_path):
    scenarios = tmp_path / "scenarios.py"
    scenarios.write_text('''
from harness.proxy.machine import ProxyMachine
from harness.scenarios import scenario

def machine(context):
    return context.enter(ProxyMachine(context.kvm))

@scenario(axes={"npt": (True, False)})
def test_launches(context, npt):
    """L2 answers."""
    machine(context).l1.launch(npt=npt).ping()

@scenario(axes={"npt": (True, False)})
def test_l3(context, npt):
    """L3 answers."""
    machine(context).level(3, npt=npt).ping()

@scenario()
def test_does_not_care(context):
    """L3 answers, in whatever paging there is."""
    l2 = machine(context).l1.launch()
    l2.launch().ping()
    context.expect("nested paging", l2.npt, None)
''')
    where = ("--kernel", one_kernel, "--param", "npt=0", "--shared", "-j", 1)
    done = nsvm("run", *where, "--results", tmp_path / "results", scenarios)
    assert done.returncode == 0, done.stdout + done.stderr
    ends = {
        event["case"]: (event["verdict"], event["reason"])
        for event in read_results(tmp_path / "results" / "results.jsonl")
        if event["event"] == "end"
    }
    why = "nested paging: KVM_GET_SUPPORTED_CPUID: 8000000A EDX[0] NPT=0"
    assert ends == {
        "launches[npt=True]": ("SKIP", why),
        "launches[npt=False]": ("PASS", ""),
        "l3[npt=True]": ("SKIP", why),
        "l3[npt=False]": ("PASS", ""),
        "does_not_care": ("PASS", ""),
    }
