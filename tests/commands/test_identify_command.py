"""`nsvm identify`, on each test kernel: the named setting comes out, with nothing unexplained."""

import pytest
from nsvm_process import load_json, nsvm

from harness.identify.by_host import NOT_SHOWN
from harness.identify.report import Report
from harness.model.knobs import SETTINGS

#: What else a kernel does not show. 5.10 has no type information of modules, and no way to ask for
#: a triple fault. SVME=0 with GIF=0 cannot be had before 7.3.
NOT_SEEN = {
    "5.10": {"save_area", "triple_fault_in_l2", "efer_unchanged"},
    "6.1": {"efer_unchanged"},
    "6.12": {"efer_unchanged"},
    "7.3": set(),
}


@pytest.mark.emulated
def test_a_kernel_is_known_by_what_it_does(kernel, tmp_path):
    if kernel not in NOT_SEEN:
        pytest.skip(f"{kernel}: not a kernel that there is a setting for")
    file = tmp_path / "identity.json"
    done = nsvm("identify", "--kernel", kernel, "--json", file)
    assert done.returncode == 0, done.stderr
    assert f"fits     {kernel} exactly" in done.stdout, done.stdout
    plain = load_json(file)
    assert plain["host"]["kernel_release"] == kernel.kernel.release
    assert plain["fits"] == {"setting": str(kernel), "exactly": True, "differences": []}
    report = Report.from_plain(plain["findings"])
    assert {each.knob for each in report.not_seen} == NOT_SHOWN.keys() | NOT_SEEN[kernel]
    # The battery tells this kernel from every other.
    alike = [name for name, knobs in SETTINGS.items() if not report.differences(knobs)]
    assert alike == [kernel]


@pytest.mark.emulated
def test_what_changed_from_one_kernel_to_another(tmp_path, all_kernels):
    one, other = all_kernels[0], all_kernels[-1]
    if not {one, other} <= NOT_SEEN.keys():
        pytest.skip(f"{one}, {other}: not kernels that there are settings for")
    file = tmp_path / "changes.json"
    done = nsvm("identify", "--compare", one, other, "--json", file)
    assert done.returncode == 0, done.stderr
    plain = load_json(file)
    expected = {each: getattr(SETTINGS[other], each) for each in SETTINGS[one].__dict__}
    changed = {e for e, value in expected.items() if value != getattr(SETTINGS[one], e)}
    assert {each["knob"] for each in plain["changes"]} == changed
    for each in plain["changes"]:
        assert each["text"] in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--compare", "5.10"], "--compare"),
        (["--compare", "5.10", "6.1", "--host", "local"], "--compare names its kernels itself"),
        (["--compare", "5.10", "6.1", "--kernel", "7.3"], "--compare names its kernels itself"),
        (["--host", "local", "--kernel", "6.1"], "cannot go with local"),
        (["--json", "/nowhere/file"], "/nowhere"),
    ],
)
def test_what_is_wrong_with_the_command_is_said(arguments, says):
    done = nsvm("identify", *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
