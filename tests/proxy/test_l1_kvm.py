"""L1 under remote control, on whatever KVM this machine has."""

import pytest

from harness.errors import ScenarioFailure
from harness.machine.errors import MachineError
from harness.proxy.cpu import ProxyTimeout
from harness.proxy.failure import GuestStopped, ProxyError, ProxyFailure
from harness.proxy.layout import proxy_instance
from harness.proxy.machine import ProxyMachine
from harness.proxy.ops import Op, Status
from harness.proxy.program import (
    GP,
    PF,
    UD,
    GuestFault,
    atomic_add,
    copy,
    fill,
    load,
    loop,
    nop,
    outb,
    rdmsr,
    simple,
    spin_until,
    store,
    triple_fault,
)
from harness.svm.msrs import Cr0, Efer, Msr

pytestmark = pytest.mark.kvm

UNMAPPED = 0x80_0000_0000


@pytest.fixture
def machine(kvm, proxy_image):
    with ProxyMachine(kvm, image=proxy_image) as made:
        yield made


@pytest.fixture
def l1(machine):
    return machine.l1


def test_registers_and_memory(machine, l1):
    assert l1.ping()
    assert Cr0(l1.read_cr(0)).PG
    assert Efer(l1.rdmsr(Msr.MSR_EFER)).LMA
    assert l1.cpuid(0)["rbx"] != 0
    l1.write(l1.scratch, 0x1122_3344_5566_7788)
    assert machine.memory.read_int(l1.scratch, 8) == 0x1122_3344_5566_7788
    assert [l1.read(l1.scratch, width) for width in (1, 2, 4)] == [0x88, 0x7788, 0x5566_7788]


def test_faults_are_results_and_the_program_goes_on(l1):
    results = l1.run([simple("UD2"), rdmsr(0x1234_5678), load(UNMAPPED), store(l1.scratch, 1)])
    assert [result.vector for result in results] == [UD, GP, PF, None]
    assert results[2].fault.cr2 == UNMAPPED
    assert results[3].ok
    with pytest.raises(GuestFault, match=r"RDMSR\(rcx=0x12345678\) raised #GP\(error=0x0"):
        l1.rdmsr(0x1234_5678)


def test_user_mode_has_no_privileges_but_memory(l1):
    l1.write(l1.scratch, 7)
    fault, value = l1.run([rdmsr(Msr.MSR_EFER).user, load(l1.scratch).user])
    assert (fault.vector, fault.fault.cpl) == (GP, 3)
    assert value.value == 7


def test_a_result_page_full_of_operations_and_more(l1):
    results = l1.run([atomic_add(l1.scratch, 1) for _ in range(300)])
    assert [result.value for result in results] == list(range(300))


def test_loops_run_inside_the_guest(l1):
    results = l1.run([loop(7, [loop(5, [atomic_add(l1.scratch, 1)]), nop()])])
    assert results[0].value == 7
    assert l1.read(l1.scratch) == 35


def test_a_loop_stops_at_a_fault_or_goes_on(l1):
    body = [atomic_add(l1.scratch, 1), simple("UD2")]
    assert l1.run([loop(5, body)])[0].values[:2] == (1, 1)
    assert l1.run([loop(5, body, stop_on_fault=False)])[0].values[:2] == (5, 5)
    assert l1.read(l1.scratch) == 6


def test_a_loop_ends_when_a_word_has_a_value(l1):
    body = [atomic_add(l1.scratch, 1)]
    program = loop(1000, body, until_gva=l1.scratch, until_value=9)
    assert l1.run([program])[0].value == 9


def test_waiting_has_a_bound(l1):
    assert l1.do(spin_until(l1.scratch, 0)).value == 0
    given_up = l1.do(spin_until(l1.scratch, 1, polls=10))
    assert (given_up.status, given_up.values[0]) == (Status.BOUND, 10)
    with pytest.raises(ScenarioFailure, match="BOUND"):
        _ = given_up.value


def test_any_code_with_registers_in_and_out(l1):
    regs = l1.exec(bytes.fromhex("4801d8 4889c1"), rax=3, rbx=4)  # ADD RAX,RBX; MOV RCX,RAX
    assert (regs["rax"], regs["rbx"], regs["rcx"]) == (7, 4, 7)
    assert l1.exec(bytes.fromhex("4801d8"), user=True, rax=1, rbx=1)["rax"] == 2


def test_block_operations(l1):
    l1.run([fill(l1.scratch, 0x5A, 256), copy(l1.scratch, l1.scratch + 0x1000, 256)])
    assert l1.read(l1.scratch + 0x10F8) == 0x5A5A_5A5A_5A5A_5A5A


def test_every_vcpu_has_its_own_levels(kvm, proxy_image):
    with ProxyMachine(kvm, image=proxy_image, vcpus=2) as machine:
        first, second = (cpu.l1 for cpu in machine.cpus)
        first.write(first.scratch, 1)
        second.write(second.scratch, 2)
        assert (first.read(second.scratch), second.read(first.scratch)) == (2, 1)
        assert second.instance["vcpu"] == 1


@pytest.mark.parametrize("options", [{"smm": True, "vcpus": 14}, {"memory_mib": 1025}])
def test_a_machine_that_is_too_large_is_refused_in_one_line(kvm, proxy_image, options):
    with pytest.raises(MachineError, match=r"^[^\n]* at most, not (14|1025)$"):
        ProxyMachine(kvm, image=proxy_image, **options)


def test_own_page_tables_can_be_changed(machine, l1):
    page = machine.pages.take()
    assert l1.read(page) == 0
    l1.tables.map(0x7000_0000_0000, page)
    l1.write(0x7000_0000_0000, 5)
    assert l1.read(page) == 5


def test_ports_that_nobody_owns_are_recorded(machine, l1):
    l1.run([outb(0x1234, 0x56, 2)])
    (write,) = machine.cpus[0].port_writes
    assert (write.port, write.size_bytes, write.value) == (0x1234, 2, 0x56)


def test_an_unknown_opcode_is_reported(l1):
    assert l1.do(Op(0x2222, "?")).status is Status.BAD_OPCODE


def test_an_endless_guest_is_a_failure_with_its_place(l1):
    with pytest.raises(ProxyTimeout) as caught:
        l1.run([nop(), l1.exec_op(bytes.fromhex("ebfe"), rbx=0x77)], timeout_s=0.3)
    text = str(caught.value)
    assert "L1: at operation 1: EXEC(rbx=0x77" in text
    assert "code=eb fe" in text


def test_a_level_in_the_middle_of_a_program_takes_no_other(l1):
    with pytest.raises(ProxyTimeout):
        l1.do(spin_until(l1.scratch, 1, polls=1 << 40), timeout_s=0.3)
    with pytest.raises(ProxyError, match=r"^L1 is in the middle of a program, .* SPIN_UNTIL"):
        l1.ping()
    l1.instance.memory.write_int(l1.scratch, 8, 1)
    (result,) = l1.go_on()
    assert result.ok
    assert l1.ping()


def test_a_scribbled_mailbox_is_a_failure(l1):
    with pytest.raises(ProxyFailure, match=r"report .* of no level"):
        l1.run([fill(l1.instance.gpa, 0, 16)])


def test_a_scribbled_program_pointer_is_a_failure(l1):
    at = l1.instance.gpa + proxy_instance.results.offset
    with pytest.raises(ScenarioFailure, match="scribbled over: results is 0x"):
        l1.run([nop(), store(at, l1.scratch)])


def test_a_dead_guest_is_a_failure_with_kvms_exit(l1):
    with pytest.raises(GuestStopped) as caught:
        l1.run([triple_fault()])
    assert caught.value.event is not None
    assert "L1: at operation 0: TRIPLE_FAULT()" in str(caught.value)


def test_what_needs_an_smm_or_a_host_says_so(machine, l1):
    with pytest.raises(MachineError, match="has no SMM"):
        _ = machine.smm
    with pytest.raises(ProxyError, match="no host to leave to"):
        l1.leave()
    with pytest.raises(ProxyError, match="has launched no guest"):
        _ = l1.host_state_gpa
