"""Where the first difference is, and which ones have a name."""

from dataclasses import dataclass, field

from harness.crosscheck.checker import check, state_class
from harness.crosscheck.deviations import DEVIATIONS, Deviation
from harness.model.operations import Execute, GetNestedState, Instruction, Outcome, Smi
from harness.model.seen import STALE_ROOT

NOP = Execute(Instruction.NOP)


@dataclass
class Scripted:
    """Answers as it was told."""

    outcomes: list[Outcome]
    over: bool = False
    asked: list = field(default_factory=list)

    def apply(self, operation):
        self.asked.append(operation)
        return self.outcomes.pop(0)


def outcome(result="ok", **seen):
    return Outcome(result, seen)


THREE = (NOP, GetNestedState(), Smi())


def differ(model, machine, operations=THREE, **options):
    return check(operations, Scripted(list(model)), Scripted(list(machine)), **options)


def test_the_same_is_no_difference():
    checked = differ([outcome(gif=True)] * 3, [outcome(gif=True)] * 3)
    assert checked.difference is None
    assert checked.steps == 3


def test_the_first_difference_ends_it():
    checked = differ([outcome(gif=True)] * 3, [outcome(gif=True), outcome(gif=False), outcome()])
    difference = checked.difference
    assert (difference.step, difference.name) == (1, "gif")
    assert (difference.expected, difference.seen) == (True, False)
    assert checked.steps == 2


def test_only_what_both_know_is_compared():
    checked = differ([outcome(gif=True, rip=1)], [outcome(gif=True, efer=5)], [NOP])
    assert checked.difference is None


def test_the_result_is_told_before_what_is_seen_and_guest_mode_before_the_rest():
    checked = differ([outcome("ok", gif=True)], [outcome("EINVAL", gif=False)], [NOP])
    assert checked.difference.name == "result"
    model, machine = outcome(rip=1, guest_mode=True), outcome(rip=2, guest_mode=False)
    assert differ([model], [machine], [NOP]).difference.name == "guest_mode"


def test_what_the_model_does_not_know_is_not_done():
    machine = Scripted([outcome()])
    checked = check([NOP, Smi()], Scripted([outcome(), outcome("unknown")]), machine)
    assert checked.steps == 1
    assert machine.asked == [NOP]


def test_nothing_is_done_to_a_vcpu_that_has_ended():
    checked = differ([outcome("shutdown")] * 3, [outcome("shutdown")] * 3)
    assert checked.steps == 1
    over = Scripted([outcome("internal error")] * 3, over=True)
    assert check([NOP, NOP], over, Scripted([outcome("internal error")])).steps == 1


NAMED = Deviation(
    "test", "a test", "nowhere", ("NOP",), r"vmcb_a\.save\.rax", expected="0x1", seen="0x2"
)


def test_a_difference_with_a_name_is_passed_over():
    model = [outcome(**{"vmcb_a.save.rax": 1})] * 2
    machine = [outcome(**{"vmcb_a.save.rax": 2})] * 2
    checked = differ(model, machine, [NOP, Smi()], deviations=[NAMED])
    assert checked.difference is None
    assert [deviation.id for deviation, _ in checked.known] == ["test"]
    assert checked.steps == 2


def test_another_operation_field_or_value_is_not_that_difference():
    for model, machine, operation in [
        ({"vmcb_a.save.rax": 1}, {"vmcb_a.save.rax": 3}, NOP),
        ({"vmcb_a.save.rax": 3}, {"vmcb_a.save.rax": 2}, NOP),
        ({"vmcb_b.save.rax": 1}, {"vmcb_b.save.rax": 2}, NOP),
        ({"vmcb_a.save.rax": 1}, {"vmcb_a.save.rax": 2}, Smi()),
    ]:
        checked = differ([outcome(**model)], [outcome(**machine)], [operation], deviations=[NAMED])
        assert checked.difference is not None


def test_a_deviation_may_be_bound_to_a_result_and_end_a_sequence():
    named = Deviation("test", "a test", "nowhere", (".*",), "rip", result="hlt", ends=True)
    model, machine = [outcome("hlt", rip=1)] * 2, [outcome("hlt", rip=2)] * 2
    checked = differ(model, machine, [NOP, Smi()], deviations=[named])
    assert (checked.difference, checked.steps) == (None, 1)
    checked = differ([outcome(rip=1)], [outcome(rip=2)], [NOP], deviations=[named])
    assert checked.difference is not None


def test_a_deviation_may_need_what_the_model_has_predicted():
    named = Deviation("test", "a test", "nowhere", ("NOP",), "result", predicted="stale_root")
    for seen, known in [({"stale_root": True}, True), ({"stale_root": False}, False), ({}, False)]:
        checked = differ([outcome("report", **seen)], [outcome("hang")], [NOP], deviations=[named])
        assert (checked.difference is None) is known


def test_l1_may_hang_only_where_its_root_is_stale():
    write = Execute(Instruction.WRMSR)
    for stale in (True, False):
        model = outcome("report", **({STALE_ROOT: True} if stale else {}))
        checked = differ([model], [outcome("hang")], [write], deviations=DEVIATIONS)
        assert (checked.difference is None) is stale


def test_another_difference_of_the_same_step_still_counts():
    model = [outcome(**{"vmcb_a.save.rax": 1, "rip": 1})]
    machine = [outcome(**{"vmcb_a.save.rax": 2, "rip": 2})]
    assert differ(model, machine, [NOP], deviations=[NAMED]).difference.name == "rip"


def test_every_named_deviation_says_what_and_where():
    assert len({each.id for each in DEVIATIONS}) == len(DEVIATIONS)
    for each in DEVIATIONS:
        assert each.what
        assert each.source
        assert each.operations


def test_states_have_words():
    assert state_class({"gif": True}) == "gif"
    assert state_class({"efer": 0x1500, "guest_mode": True, "run_pending": True}) == "svme gm rp"
    assert state_class({}) == "plain"
