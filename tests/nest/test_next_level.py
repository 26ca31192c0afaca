"""Whose fault it is what a level says, or does not say any more."""

import pytest

from harness.errors import HostError, ScenarioFailure
from harness.host.session import CallResult
from harness.nest.next_level import LevelFailed, LevelWrong, _value
from harness.proxy.cpu import ProxyTimeout


def raised(error):
    bases = [kind.__name__ for kind in type(error).__mro__]
    error = {"type": type(error).__name__, "bases": bases, "message": str(error)}
    return CallResult("raise", error=error)


def died(status):
    return CallResult("died", raw={"status": status})


def test_what_a_level_returns_is_passed_on():
    assert _value("L1", CallResult("return", value={"L1": {}})) == {"L1": {}}


@pytest.mark.parametrize(
    ("result", "kind", "said"),
    [
        (raised(ScenarioFailure("time went back")), LevelWrong, "L1: ScenarioFailure: time went"),
        (raised(LevelWrong("L2: ScenarioFailure: oh")), LevelWrong, "L2: ScenarioFailure: oh"),
        (raised(HostError("no image")), LevelFailed, "L1: HostError: no image"),
        (raised(LevelFailed("L2: HostError: oh")), LevelFailed, "L2: HostError: oh"),
        (died(-11), LevelWrong, "L1: the call crashed, SIGSEGV"),
        (died(-9), LevelFailed, "L1: the call ended as died -9"),
        (died(1), LevelFailed, "L1: the call ended as died 1"),
        (CallResult("timeout"), LevelFailed, "L1: the call ended as timeout"),
    ],
)
def test_who_is_at_fault(result, kind, said):
    with pytest.raises(kind, match=f"^{said}"):
        _value("L1", result)


def test_a_guest_that_may_only_be_slow_is_no_failure():
    bases = [kind.__name__ for kind in ProxyTimeout.__mro__]
    assert "ScenarioFailure" in bases
    result = CallResult("raise", error={"type": bases[0], "bases": bases, "message": "5 s"})
    with pytest.raises(LevelFailed, match="L1: ProxyTimeout: 5 s"):
        _value("L1", result)
