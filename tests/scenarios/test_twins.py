"""Twins notice what a mover loses: a register, an MSR, an event, a word of memory, nested state."""

import re

import pytest
from nsvm_process import Nsvm, wait_until

from guest_images import build
from harness.errors import ScenarioFailure
from harness.machine.addresses import Gpa
from harness.migrate.difference import Difference
from harness.migrate.errors import Refused
from harness.proxy.program import atomic_add, load, loop, rdmsr, store, wrmsr
from harness.scenarios import twins
from harness.scenarios.context import Context
from harness.svm.msrs import Msr

LSTAR = 0xFFFF_8000_0012_3000


def vcpu_of(machine):
    return machine.vcpus[0].vcpu


def lose_a_register(machine):
    regs = vcpu_of(machine).get_regs()
    regs.r15 ^= 1
    vcpu_of(machine).set_regs(regs)


def lose_an_msr(machine):
    vcpu_of(machine).set_msrs({Msr.MSR_LSTAR: 0})


def lose_a_debug_register(machine):
    regs = vcpu_of(machine).get_debugregs()
    regs.db[1] ^= 8
    vcpu_of(machine).set_debugregs(regs)


def lose_a_word(machine):
    machine.memory.write_int(machine.l1.scratch, 8, 0)


def gain_a_word(machine):
    """In a page that holds nothing, and that no program looks at."""
    machine.memory.write_int(machine.memory_bytes - 8, 8, 1)


def keep_all(machine):
    pass


CHEATS = {
    lose_a_register: r"at stop 1, after it: .*vcpu0\.regs\.r15: ",
    lose_an_msr: r"at stop 1, after it: .*vcpu0\.msrs\.0xc0000082: 0xffff800000123000, ",
    lose_a_debug_register: r"at stop 1, after it: .*vcpu0\.debugregs\.db\[1\]: ",
    lose_a_word: r"the moved twin's loaded: ",
    gain_a_word: r"at memory: .*memory at 0xfffff8: 0x0, the other has 0x1",
}


def cheating(cheat):
    def mover(machine):
        with machine.paused():
            notes = twins.move_in_process(machine)
            cheat(machine)
        return notes

    return mover


def journey(machine, log):
    l1 = machine.l1
    l1.run([wrmsr(Msr.MSR_LSTAR, LSTAR), store(l1.scratch, 7)])
    yield
    log("loaded", l1.run(load(l1.scratch)))
    log("MSR", l1.run(rdmsr(Msr.MSR_LSTAR)))


@pytest.fixture(scope="module")
def proxy_image(tmp_path_factory):
    return build("proxy", cache=tmp_path_factory.mktemp("images")).read_bytes()


@pytest.fixture
def context(kvm):
    with Context(lambda *_, **__: None) as made:
        made.kvm = kvm
        yield made


@pytest.fixture
def expect(context, proxy_image):
    """Return `expect_twins` with the image that tests have."""

    def expect_twins(journey, how=twins.expect_twins, **options):
        return how(context, journey, image=proxy_image, **options)

    return expect_twins


pytestmark = pytest.mark.kvm


def test_an_honest_mover_passes(expect):
    assert expect(journey, mover=cheating(keep_all)) == 1


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda cheat: cheat.__name__)
def test_what_a_mover_loses_is_noticed(expect, cheat):
    with pytest.raises(ScenarioFailure, match=CHEATS[cheat]):
        expect(journey, mover=cheating(cheat))


@pytest.mark.parametrize("cheat", [lose_a_word, lose_an_msr, gain_a_word])
def test_what_one_cut_of_many_loses_is_noticed(expect, cheat):
    with pytest.raises(ScenarioFailure, match="expected"):
        expect(journey, twins.expect_twins_of_each_cut, mover=cheating(cheat))


def test_each_cut_is_moved_once(expect):
    assert expect(journey, twins.expect_twins_of_each_cut) == 4


def test_moves_are_counted_everywhere(expect):
    assert expect(journey, everywhere=True) == 1 + 4


def test_an_excuse_excuses_only_what_it_names(expect):
    with pytest.raises(ScenarioFailure, match=r"msrs\.0xc0000082"):
        expect(journey, mover=cheating(lose_an_msr), excused=[r"vcpu0\.msrs\.0xc0000081"])


def test_a_running_guest_is_moved_and_counts_on(expect):
    def counts(machine, log):
        l1 = machine.l1
        l1.ping()
        body = loop(10_000, [atomic_add(l1.scratch, 1)])
        thread = machine.in_thread(l1, lambda it: it.run(body, timeout_s=60))
        # A word that is still 0 could be lost unnoticed.
        counter = Gpa(l1.scratch)
        wait_until(lambda: machine.memory.read_int(counter, 8), "the guest to count", 30)
        yield thread
        log("loop", thread.join(60))

    assert expect(counts) > 1
    with pytest.raises(ScenarioFailure, match="the moved twin's loop"):
        expect(counts, mover=cheating(lose_a_word))


def test_a_journey_that_fails_says_which_twin_it_was(expect):
    def fails(machine, log):
        machine.l1.ping()
        log("pinged", True)
        yield
        if machine.memory.read_int(machine.memory_bytes - 8, 8):
            raise ScenarioFailure("it is gone")

    with pytest.raises(ScenarioFailure, match=r"^the twin that is moved, after 'pinged': it is go"):
        expect(fails, mover=cheating(gain_a_word))


def test_a_refused_move_is_a_failure_of_the_scenario(expect):
    def refuse(machine):
        raise Refused("vcpu 0: nested: no")

    with pytest.raises(ScenarioFailure, match=r"^move 1: vcpu 0: nested: no"):
        expect(journey, mover=refuse)


def test_journeys_of_different_length_are_noticed(expect):
    def stops(machine, log):
        machine.l1.ping()
        yield
        if not machine.memory.read_int(machine.memory_bytes - 8, 8):
            yield

    with pytest.raises(ScenarioFailure, match="journey: expected goes on, saw is over"):
        expect(stops, mover=cheating(gain_a_word))


NESTED = '''
from harness.facts import nested_svm
from harness.proxy.program import load, rdmsr, store
from harness.scenarios import scenario
from harness.scenarios.twins import expect_twins, move_in_process
from kvm_ioctl.asm_kvm import NestedStateFlags, kvm_nested_state

VMCB12_INTERCEPTS = 0x0C

def keep(machine):
    return move_in_process(machine)

def lose_l2(machine):
    notes = move_in_process(machine)
    state = kvm_nested_state()
    state.flags, state.size = NestedStateFlags.KVM_STATE_NESTED_GIF_SET, 128
    state.format = machine.vcpus[0].vcpu.get_nested_state().format
    machine.vcpus[0].vcpu.set_nested_state(state)
    return notes

def lose_an_intercept(machine):
    notes = move_in_process(machine)
    vcpu = machine.vcpus[0].vcpu
    state = vcpu.get_nested_state()
    state.data[VMCB12_INTERCEPTS + 2] = 0
    vcpu.set_nested_state(state)
    return notes

def journey(machine, log):
    l2 = machine.l1.launch(vmcb={"intercept.cpuid": 1})
    log("before", l2.run(store(l2.scratch, 1)))
    yield
    log("after", l2.run(load(l2.scratch)))

MOVERS = {"keep": keep, "lose_l2": lose_l2, "lose_an_intercept": lose_an_intercept}

@scenario(needs=[nested_svm], axes={"mover": tuple(MOVERS)}, levels=2)
def test_twins(context, mover):
    """Twins with a mover that may cheat."""
    expect_twins(context, journey, mover=MOVERS[mover])
'''

NESTED_VERDICTS = {
    "twins[mover=keep]": ("PASS", ""),
    "twins[mover=lose_l2]": ("FAIL", r"at stop 1, after it: .*vcpu0\.nested\.flags: 0x101, "),
    "twins[mover=lose_an_intercept]": ("FAIL", r"at stop 1, after it: .*vcpu0\.nested\.vmcb12\."),
}


@pytest.mark.emulated
def test_lost_nested_state_is_noticed(one_kernel, tmp_path):
    file = tmp_path / "nested.py"
    file.write_text(NESTED)
    with Nsvm(
        "run", "-j", 1, "--shared", "--kernel", one_kernel, file, results=tmp_path / "results"
    ) as run:
        run.end()
        ends = run.ends()
    assert {case: end["verdict"] for case, end in ends.items()} == {
        case: verdict for case, (verdict, _) in NESTED_VERDICTS.items()
    }
    for case, (_, reason) in NESTED_VERDICTS.items():
        assert re.search(reason, ends[case]["reason"]), ends[case]["reason"]


@pytest.mark.parametrize(
    ("what", "other", "excused"),
    [
        ("memory at 0x2177d8", 0x100471, True),
        ("memory at 0x2177d8", 0x100470, False),
        ("memory at 0x2177e0", 0x100471, False),
        ("memory at 0x2177d8 in SMRAM", 0x100471, False),
        ("vcpu0.regs.rip", 0x100471, False),
        ("memory at 0x2177d8", None, False),
    ],
)
def test_only_where_an_interrupt_was_taken_may_be_a_nop_apart(what, other, excused):
    assert twins._is_of_a_tick(Difference(what, 0x100472, other)) is excused
