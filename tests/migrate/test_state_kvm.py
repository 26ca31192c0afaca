"""Plain machines through a stream and back, on this machine's KVM; none of this needs SVM."""

import contextlib
import io
import os
import struct
import threading

import pytest
from forged_stream import Mutator, Raw, seal, take_apart

from harness.errors import HarnessError
from harness.machine.addresses import Gpa
from harness.machine.guest_abi import HELLO_STATUS, HELLO_TEXT
from harness.machine.hang import VcpuTimeout
from harness.machine.loader import raw_image
from harness.machine.machine import Machine
from harness.machine.vcpu import PortOut
from harness.migrate.difference import memory_differences, state_differences
from harness.migrate.errors import Refused, StreamError
from harness.migrate.inspect import compare, inspect_stream
from harness.migrate.notes import Loss
from harness.migrate.orders import DEFAULT, NAMED
from harness.migrate.shape import BlankMachine, Shape, wants_whole_events
from harness.migrate.state import MachineState, StateReader, StateWriter, _Step, capture
from harness.migrate.transfer import load, save
from kvm_ioctl.asm_kvm import kvm_regs
from kvm_ioctl.capabilities import Cap

pytestmark = pytest.mark.kvm

MANGLED = 200
COUNT_UP = bytes.fromhex("fec0 e680 ebfa")  # inc al / out 0x80, al / jmp: back to inc


def saved(machine, sides=None):
    stream = io.BytesIO()
    save(machine, stream, sides)
    return stream.getvalue()


def left_behind():
    with open("/proc/self/maps") as maps:
        vcpus = sum("kvm-vcpu" in line for line in maps)
    return len(os.listdir("/proc/self/fd")), vcpus, threading.active_count()


def size_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * 4096


@pytest.fixture
def loop(kvm, images):
    """Two vCPUs in the middle of what they do, in memory with something in every slot."""
    with Machine(kvm, image=images("loop"), vcpus=2, memory_mib=256, irqchip=True) as machine:
        machine.memory.write(Gpa(0x300FF0), b"over a page's end" * 4)
        for vcpu in machine.vcpus:
            with pytest.raises(VcpuTimeout):
                vcpu.run(timeout_s=0.02)
        yield machine


@pytest.mark.parametrize("order", NAMED.values(), ids=NAMED)
def test_a_loaded_machine_has_the_same_state_and_memory(kvm, loop, order):
    stream = io.BytesIO()
    done = save(loop, stream, {"mine": {"a": [1]}})
    stream.seek(0)
    loaded = load(kvm, stream, order=order)
    with loaded.machine as machine:
        assert loaded.sides == {"mine": {"a": [1]}}
        assert loaded.state == done.state
        assert [note for note in loaded.notes if note.loss is Loss.NOT_TAKEN] == []
        assert state_differences(done.state, capture(machine)) == []
        assert memory_differences(loop, machine) == []
        assert machine.memory.read(Gpa(0x300FF0), 4) == b"over"


def test_the_first_byte_that_differs_is_found(kvm, loop):
    with load(kvm, io.BytesIO(saved(loop))).machine as machine:
        machine.memory.write(Gpa(0x200008), b"\1")
        regs = machine.vcpus[1].vcpu.get_regs()
        regs.r15 = 77
        machine.vcpus[1].vcpu.set_regs(regs)
        [found] = memory_differences(loop, machine)
        assert str(found) == "memory at 0x200008: 0x0, the other has 0x1"
        [found] = state_differences(capture(loop), capture(machine))
        assert str(found) == "vcpu1.regs.r15: 0x0, the other has 0x4d"


def test_a_loaded_machine_goes_on(kvm, loop):
    with load(kvm, io.BytesIO(saved(loop))).machine as machine:
        for vcpu in machine.vcpus:
            with pytest.raises(VcpuTimeout) as caught:
                vcpu.run(timeout_s=0.02)
            assert caught.value.hang.rip == loop.image.symbol("spin")


@pytest.mark.parametrize("irqchip", [False, True])
def test_a_machine_that_has_not_run_yet_runs_where_it_is_loaded(kvm, images, irqchip):
    with Machine(kvm, image=images("hello"), memory_mib=4, irqchip=irqchip) as machine:
        stream = saved(machine)
    with load(kvm, io.BytesIO(stream)).machine as machine:
        assert machine.vcpus[0].run_until_exit().status == HELLO_STATUS
        assert machine.console == HELLO_TEXT


def test_a_guest_that_is_moved_again_and_again_counts_on(kvm):
    with Machine(kvm, image=raw_image(COUNT_UP, 0x8000), memory_mib=1) as machine:
        first = machine.vcpus[0].run()
        stream = saved(machine)
    seen = [first.value]
    for _ in range(5):
        with load(kvm, io.BytesIO(stream)).machine as machine:
            event = machine.vcpus[0].run()
            assert isinstance(event, PortOut)
            seen.append(event.value)
            stream = saved(machine)
    assert seen == list(range(seen[0], seen[0] + 6))


def test_two_streams_of_one_machine_differ_in_time_only(kvm, loop):
    one, other = (inspect_stream(io.BytesIO(saved(loop))) for _ in range(2))
    assert compare(one, other).differences == ()


def test_a_machine_without_vcpus_can_be_moved(kvm):
    with Machine(kvm, vcpus=0, memory_mib=1) as machine:
        stream = saved(machine, {"mine": 1})
    with load(kvm, io.BytesIO(stream)).machine as machine:
        assert machine.vcpus == []


def test_an_order_that_leaves_a_part_out_is_refused(kvm, loop):
    before = left_behind()
    with pytest.raises(HarnessError, match="an order has each of cpuid"):
        load(kvm, io.BytesIO(saved(loop)), order=DEFAULT[:-1])
    assert left_behind() == before


def test_what_kvm_refuses_is_named_with_its_part(kvm, loop):
    stream = saved(loop)
    sections = take_apart(stream)
    vcpu = next(i for i, raw in enumerate(sections) if raw.tag == b"VCPU")
    mp_state = sections[vcpu].body.index(b"\x08mp_state") + 13
    body = bytearray(sections[vcpu].body)
    body[mp_state : mp_state + 4] = b"\xff\xff\xff\x7f"
    sections[vcpu] = Raw(b"VCPU", bytes(body))
    before = left_behind()
    with pytest.raises(Refused, match=r"vcpu 0: mp_state: KVM_SET_MP_STATE on vcpu fd: EINVAL"):
        load(kvm, io.BytesIO(seal(sections)))
    assert left_behind() == before


BEFORE = pytest.mark.parametrize("early", [False, True], ids=["all of it", "CPUID before"])
PAT_MSR, STAR, SFMASK = 0x277, 0xC0000081, 0xC0000084
PAT = 0x0007040600070406


@contextlib.contextmanager
def blank(kvm, machine, early):
    """A machine of the same shape, what writes its state, and the state of the other one."""
    state = capture(machine)
    with BlankMachine(kvm, Shape.of(machine)) as other:
        writer = StateWriter(other, DEFAULT)
        if early:
            for number, parts in enumerate(state.vcpus):
                writer.begin(number, parts)
        yield other, writer, state


def changed(state, **parts):
    """The same with other parts of vCPU 0."""
    first, *others = state.vcpus
    return MachineState(state.vm, ({**first, **parts}, *others))


@BEFORE
def test_a_refused_msr_is_noted_and_the_others_are_written(kvm, loop, early):
    msrs = [(PAT_MSR, PAT), (0x1234567, 5), (STAR, 0x77), (0x1234568, 0), (SFMASK, 0x200)]
    packed = b"".join(struct.pack("<IIQ", index, 0, value) for index, value in msrs)
    with blank(kvm, loop, early) as (machine, writer, state):
        notes = writer.write(changed(state, msrs=packed))
        values = machine.vcpus[0].vcpu.get_msrs([PAT_MSR, STAR, SFMASK])
    assert values == {PAT_MSR: PAT, STAR: 0x77, SFMASK: 0x200}
    assert [note.what for note in notes] == ["msrs.0x1234567"]


@BEFORE
def test_what_is_refused_is_named_with_its_part(kvm, loop, early):
    with (
        blank(kvm, loop, early) as (_, writer, state),
        pytest.raises(Refused, match=r"vcpu 0: mp_state: KVM_SET_MP_STATE on vcpu fd: EINVAL"),
    ):
        writer.write(changed(state, mp_state=b"\xff" * 4))


def test_all_is_written_at_once_if_cpuid_is_there(kvm, loop, monkeypatch):
    with blank(kvm, loop, True) as (machine, writer, state):
        with monkeypatch.context() as patched:
            patched.setattr(_Step, "write", lambda step, data: pytest.fail(step.name))
            writer.write(state)
        assert state_differences(state, capture(machine)) == []


def test_other_leaves_than_before_are_written_again(kvm, loop):
    with blank(kvm, loop, False) as (machine, writer, state):
        writer.begin(0, {"cpuid": state.vcpus[0]["cpuid"][:-40]})
        writer.write(state)
        assert state_differences(state, capture(machine)) == []


def test_a_reader_sees_what_changes_and_asks_again_for_msrs(kvm):
    with Machine(kvm, vcpus=1, memory_mib=1) as machine:
        wants_whole_events(machine.vm)
        reader, vcpu = StateReader(machine), machine.vcpus[0].vcpu
        before = reader.read().state()
        vcpu.set_regs(kvm_regs(rax=0x55, rflags=2))
        vcpu.set_msrs({0xC0000081: 0x99})
        vcpu.set_cpuid2(vcpu.get_cpuid2()[:-1])
        after = reader.read().state()
        assert state_differences(after, capture(machine)) == []
        one, other = before.vcpus[0], after.vcpus[0]
        assert {"regs", "msrs", "cpuid"} <= {name for name in one if one[name] != other[name]}


def test_every_truncation_leaves_nothing_behind(kvm, loop):
    stream = saved(loop)
    before = left_behind()
    for size in range(0, len(stream), len(stream) // 40):
        with pytest.raises(StreamError, match="cut off"):
            load(kvm, io.BytesIO(stream[:size]))
        assert left_behind() == before


def end_of_loading(kvm, stream):
    """Load; return "loaded", or the class of the error, which has one line."""
    error = None
    try:
        load(kvm, io.BytesIO(stream)).machine.close()
    except (StreamError, Refused) as e:
        error = e
    if error is None:
        return "loaded"
    assert str(error).isprintable()
    assert len(str(error)) < 400
    return type(error)


def test_mangled_streams_end_in_one_line_or_in_a_machine(kvm, loop):
    stream = saved(loop, {"mine": [1]})
    before, size = left_behind(), size_bytes()
    ends = set()
    for seed in range(MANGLED):
        ends.add(end_of_loading(kvm, Mutator(stream, seed).mutated()))
        assert left_behind() == before, f"seed {seed}"
    # Each of the layers was reached, and of so many machines of 256 MiB none is left. (Less than
    # two, to be exact: a new thread alone makes glibc reserve 64 MiB.)
    assert ends == {StreamError, Refused, "loaded"}
    assert size_bytes() - size < 512 << 20


def test_a_pit_comes_along(kvm):
    with Machine(kvm, vcpus=1, memory_mib=1, irqchip=True) as machine:
        machine.vm.create_pit2()
        pit = machine.vm.get_pit2()
        pit.channels[2].count, pit.channels[2].mode, pit.channels[2].gate = 0x1234, 2, 1
        machine.vm.set_pit2(pit)
        state = capture(machine)
        loaded = load(kvm, io.BytesIO(saved(machine)))
        with loaded.machine as other:
            there = other.vm.get_pit2()
            assert (there.channels[2].count, there.channels[2].mode) == (0x1234, 2)
            assert state_differences(state, capture(other)) == []


def test_a_machine_without_a_pit_gets_none(kvm):
    with Machine(kvm, vcpus=1, memory_mib=1, irqchip=True) as machine:
        assert "pit" not in capture(machine).vm


COALESCED_PORT = 0x90
TWO_OUTS = bytes.fromhex("b041 e690 b042 e690 e680 f4")  # mov al / out 0x90, twice; out 0x80; hlt


def test_coalesced_writes_are_delivered_before_the_state_is_taken(kvm):
    with Machine(kvm, image=raw_image(TWO_OUTS, Gpa(0x1000)), memory_mib=1) as machine:
        if not kvm.check_extension(Cap.KVM_CAP_COALESCED_PIO):
            pytest.skip("KVM_CAP_COALESCED_PIO: 0")
        (runner,) = machine.vcpus
        machine.vm.register_coalesced_pio(COALESCED_PORT, 1)
        assert runner.run(5) == PortOut(0x80, 1, 0x42)
        assert runner.waiting_events == ()
        capture(machine)
        written = [PortOut(COALESCED_PORT, 1, 0x41), PortOut(COALESCED_PORT, 1, 0x42)]
        assert list(runner.waiting_events) == written
        assert [runner.run(5), runner.run(5)] == written
