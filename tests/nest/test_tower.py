"""The verdict on a tower, and what of its levels reaches the outside."""

import pytest

from harness.errors import HostLost
from harness.host.session import CallResult
from harness.nest.plan import Inner, Plan
from harness.nest.workloads import entry_sums
from harness.report.verdict import Verdict
from harness.runner.nest import Tower, judge

PLAN = Plan(depth=1)
ENTRIES = {"rounds": ["0: a", "1: b"], "proxy": ["0: c"]}


def emitted(kind, **data):
    return {"event": "emit", "kind": kind, "data": data}


def good():
    return {name: entry_sums(entries) for name, entries in ENTRIES.items()}


def returned(**levels):
    return CallResult("return", value=levels)


@pytest.fixture
def tower():
    return Tower(lambda text: None)


def test_levels_that_agree_pass(tower):
    verdict, why = judge(returned(L1=good()), tower, PLAN, ENTRIES)
    assert verdict is Verdict.PASS, why


def test_a_level_that_differs_fails_by_name_and_entry(tower):
    plan = Plan(depth=2)
    bad = {**good(), "rounds": entry_sums(["0: a", "1: x"])}
    verdict, why = judge(returned(L1=good(), L2=bad), tower, plan, ENTRIES)
    assert verdict is Verdict.FAIL
    assert why == "L2: rounds: differs from what it must be at '1: b'"


def test_a_level_that_did_less_fails(tower):
    bad = {**good(), "rounds": entry_sums(["0: a"])}
    verdict, why = judge(returned(L1=bad), tower, PLAN, ENTRIES)
    assert (verdict, why) == (Verdict.FAIL, "L1: rounds: 1 entries, not 2")


def test_a_level_that_never_reported_is_an_error(tower):
    verdict, why = judge(returned(L1=good()), tower, Plan(depth=1, inner=Inner.LINUX), ENTRIES)
    assert (verdict, why) == (Verdict.ERROR, "only L1 reported")


def test_a_panic_fails_and_names_its_level(tower):
    tower.take(emitted("console", level=2, text="[ 1.0] Kernel panic - not syncing: oh\n"))
    tower.take(emitted("lost", level=2, why="L2 is lost: triple fault", console="oh"))
    tower.take(emitted("lost", level=1, why="L1 is lost: the channel ended", console=""))
    result = CallResult("raise", error={"type": "HostLost", "message": "L2 is lost"})
    verdict, why = judge(result, tower, PLAN, {})
    assert verdict is Verdict.FAIL
    assert why == "L2's kernel: [ 1.0] Kernel panic - not syncing: oh"
    assert tower.lost["level"] == 2


def test_a_panic_in_pieces_is_one(tower):
    for text in ("[ 1.0] Kernel pa", "nic - not syncing\n"):
        tower.take(emitted("console", level=1, text=text))
    result = CallResult("raise", error={"type": "HostLost", "message": "L1 is lost"})
    assert judge(result, tower, PLAN, {})[0] is Verdict.FAIL


def test_a_splat_in_the_host_fails_even_if_all_agree(tower):
    tower.take({"event": "kmsg", "id": 1, "level": 4, "text": "WARNING: CPU: 0 PID: 1 at svm.c"})
    verdict, why = judge(returned(L1=good()), tower, PLAN, ENTRIES)
    assert verdict is Verdict.FAIL
    assert why.startswith("L0's kernel: WARNING: CPU: 0")


@pytest.mark.parametrize("why", ["L2 is lost: no sign of life for 20 s", "no 'ready' within 90 s"])
def test_a_level_that_only_stops_is_an_error(tower, why):
    """Whether it hangs or is slow cannot be told from outside."""
    tower.take(emitted("lost", level=2, why=why, console=""))
    result = CallResult("raise", error={"type": "HostLost", "message": why})
    assert judge(result, tower, PLAN, {}) == (Verdict.ERROR, why)


def test_a_level_that_the_host_cannot_run_on_fails(tower):
    why = "L1 is lost: vCPU 0: triple fault (KVM_EXIT_SHUTDOWN)"
    tower.take(emitted("lost", level=1, why=why, console=""))
    result = CallResult("raise", error={"type": "HostLost", "message": why})
    assert judge(result, tower, PLAN, {}) == (Verdict.FAIL, why)


def test_a_level_whose_vmm_was_killed_is_an_error(tower):
    why = "L1 is lost: QEMU was ended by SIGKILL"
    tower.take(emitted("lost", level=1, why=why, console="", vmm=True))
    result = CallResult("raise", error={"type": "VmmLost", "message": why})
    assert judge(result, tower, PLAN, {}) == (Verdict.ERROR, why)


@pytest.mark.parametrize(
    ("kind", "base", "verdict"),
    [
        ("LevelWrong", "ScenarioFailure", Verdict.FAIL),
        ("LevelFailed", "HostError", Verdict.ERROR),
    ],
)
def test_who_is_at_fault_decides(tower, kind, base, verdict):
    message = f"L2: {base}: memory is not as it was left"
    error = {"type": kind, "bases": [kind, base], "message": message}
    assert judge(CallResult("raise", error=error), tower, PLAN, {}) == (verdict, message)


def test_a_host_that_dies_is_an_error(tower):
    verdict, why = judge(HostLost("the emulated host hangs"), tower, PLAN, {})
    assert (verdict, why) == (Verdict.ERROR, "L0: the emulated host hangs")


def test_consoles_go_to_files_of_their_own(tmp_path):
    tower = Tower(lambda text: None, tmp_path / "consoles")
    tower.take(emitted("console", level=1, text="one "))
    tower.take(emitted("console", level=2, text="two\n"))
    tower.take(emitted("console", level=1, text="more\n"))
    tower.take(emitted("kmsg", level=1, priority=4, text="kvm: hello"))
    files = {path.name: path.read_text() for path in (tmp_path / "consoles").iterdir()}
    assert files == {
        "L1-console.log": "one more\n",
        "L2-console.log": "two\n",
        "L1-kernel.log": "kvm: hello\n",
    }


def test_progress_is_told_by_level():
    said = []
    tower = Tower(said.append)
    tower.take(emitted("stage", level=1, what="ready", seconds=4.2))
    assert said[0].endswith(" s  L1 ready")
    assert tower.levels[1].stages == {"ready": 4.2}


@pytest.mark.parametrize("kind", ["rounds", "proxy"])
def test_a_transcript_that_nobody_gave_is_an_error(tower, kind):
    for said in ({}, {kind: []}):
        report = {name: sums for name, sums in good().items() if name != kind} | said
        wanted = ENTRIES | ({kind: []} if said else {})
        verdict, why = judge(returned(L1=report), tower, PLAN, wanted)
        assert (verdict, why) == (Verdict.ERROR, f"L1: {kind}: nothing was reported")


def test_only_the_innermost_level_has_a_proxy(tower):
    outer = {"rounds": good()["rounds"]}
    verdict, why = judge(returned(L1=outer, L2=good()), tower, Plan(depth=2), ENTRIES)
    assert verdict is Verdict.PASS, why


def test_too_few_moves_or_smis_are_an_error(tower):
    for plan, what in ((Plan(moves=2), "move"), (Plan(smis=2), "SMI")):
        verdict, why = judge(returned(L1=good()), tower, plan, ENTRIES)
        assert (verdict, why) == (Verdict.ERROR, f"L1: {what}: 0 times, not 2")


def test_smis_are_told_once_all_were_taken():
    said = []
    tower = Tower(said.append)
    for number, hit in ((1, False), (2, True)):
        tower.take(emitted("smi", number=number, of=2, left_guest=hit, seconds=0.1, way="KVM_SMI"))
    assert len(said) == 1
    assert said[0].endswith("L1 took 2 SMIs, 1 of them while a guest of its ran")


def test_seconds_of_a_slow_clock_are_made_ours():
    tower = Tower(lambda text: None, slow_clock=10)
    for number in (1, 2):
        tower.take(emitted("stage", level=number, what="ready", seconds=4.2))
    assert [tower.levels[number].stages["ready"] for number in (1, 2)] == [4.2, 42.0]
