"""The harness's own claims about allocation, on each test kernel."""

import pytest
from nsvm_process import Nsvm, load_json

from harness.host.bundle import tree_root

pytestmark = pytest.mark.emulated

SCENARIOS = sorted(tree_root().glob("harness/scenarios/test_allocation*.py"))


def test_every_scenario_passes(kernel, tmp_path):
    with Nsvm("run", "--kernel", kernel, *SCENARIOS, results=tmp_path / "results") as run:
        status, output = run.end()
        ends = run.ends()
    # 5.10's memory.stat has no line for the kernel's memory; nothing else may be left out.
    others = {
        case: end["reason"]
        for case, end in ends.items()
        if end["verdict"] != "PASS"
        and not (end["verdict"] == "SKIP" and "memory.current" in end["reason"])
    }
    assert others == {}, output
    assert len(ends) > 40
    assert status == 0


@pytest.mark.parametrize("path", ["wrmsr", "sregs"])
def test_every_probe_measures_what_the_model_says(kernel, tmp_path, path):
    file = tmp_path / "memory.json"
    with Nsvm("memory", "--kernel", kernel, "--path", path, "--json", file) as run:
        status, output = run.end()
    assert status == 0, output
    report = load_json(file)
    assert set(report["probes"]) == {"page_alloc", "functions", "memcg"}
    for name, reading in report["probes"].items():
        # The memory controller's books have other people's slab pages in them now and then.
        slack = 2048 if name == "memcg" else 0
        assert abs(reading["delta_bytes_per_vcpu"] - 12288) <= slack, (name, output)
        assert abs(reading["off_bytes_per_vcpu"]) <= slack, (name, output)
    assert report["verdict"] == "PASS"
    assert report["host"]["kernel_release"] == kernel.kernel.release
