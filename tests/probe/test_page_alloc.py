"""The ledger of pages: who asked for a block, who holds it, and what is not counted."""

import pytest
import records

from harness.errors import HarnessError
from harness.probe.page_alloc import CallSite, PageAllocProbe, call_site
from harness.probe.tracefs import TraceEvent, parse

kernels = pytest.mark.parametrize("kernel", records.KERNELS)


class FakeTrace:
    """Gives recorded events, one batch for each time it is asked."""

    def __init__(self, *batches):
        self.batches = list(batches)

    def take(self):
        return self.batches.pop(0) if self.batches else []


def probe(tid, *batches):
    made = PageAllocProbe()
    made._trace = FakeTrace(*batches)
    made._threads = {tid}
    return made


SITES = {
    "5.10": ("svm_create_vcpu", "svm_allocate_nested", "svm_vcpu_alloc_msrpm"),
    "6.1": ("svm_vcpu_create", "svm_allocate_nested", "svm_vcpu_alloc_msrpm"),
    "7.3": ("svm_vcpu_create", "svm_allocate_nested", "svm_alloc_permissions_map"),
}


@kernels
def test_call_sites_are_the_functions_that_asked(kernel):
    fault, slab, vcpu, page, permissions, *_ = map(call_site, parse(records.pages(kernel)))
    assert fault is None, "this process's own memory is nobody's nested state"
    assert slab is None, "slab pages are caches that all share"
    assert (vcpu.function, page.function, permissions.function) == SITES[kernel]
    assert (page.order, permissions.order) == (0, 1)
    assert (page.size_bytes, permissions.size_bytes) == (4096, 8192)


@kernels
def test_only_what_is_asked_for_below_efers_setter_is_nested_state(kernel):
    _, _, vcpu, page, permissions, *_ = map(call_site, parse(records.pages(kernel)))
    assert (vcpu.is_nested, page.is_nested, permissions.is_nested) == (False, True, True)
    assert page.via[0] == "svm_set_efer"
    assert permissions.via[:2] == ("svm_allocate_nested", "svm_set_efer")
    assert page.via[-1] == "kvm_vcpu_ioctl"


# On 5.10, under memory pressure.
FAULT_IN_AN_IOCTL = """\
            init-68      [000] ....     7.1: mm_page_alloc: page=1 pfn=29125 order=0 migratetype=1
            init-68      [000] ....     7.2: <stack trace>
 => trace_event_raw_event_mm_page_alloc
 => __alloc_pages_nodemask
 => alloc_pages_vma
 => wp_page_copy
 => handle_mm_fault
 => do_user_addr_fault
 => exc_page_fault
 => asm_exc_page_fault
 => copy_user_generic_unrolled
 => _copy_to_user
 => msr_io
 => kvm_arch_vcpu_ioctl
 => kvm_vcpu_ioctl
 => __x64_sys_ioctl
"""


@pytest.mark.parametrize(
    "entry", ["asm_exc_page_fault", "asm_sysvec_apic_timer_interrupt", "asm_common_interrupt"]
)
def test_what_interrupts_an_ioctl_did_not_ask_for_kvm(entry):
    [event] = parse(FAULT_IN_AN_IOCTL.replace("asm_exc_page_fault", entry))
    assert call_site(event) is None
    [event] = parse(FAULT_IN_AN_IOCTL.replace("asm_exc_page_fault", "called"))
    assert call_site(event) is not None


def test_a_setter_that_asks_itself_is_nested_state_too():
    """Should the compiler inline svm_allocate_nested one day."""
    assert CallSite("svm_set_efer", 0, ("kvm_vcpu_ioctl",)).is_nested


def test_what_rsm_allocates_without_the_setter_is_nested_state_too():
    stack = ("svm_allocate_nested", "svm_leave_smm", "em_rsm", "kvm_vcpu_ioctl")
    assert CallSite("svm_vcpu_alloc_msrpm", 1, stack).is_nested


def test_a_stack_that_ends_at_a_return_probe_is_no_call_site():
    """On 5.10, and the reason why this probe is not armed together with the functions one."""
    assert [call_site(e) for e in parse(records.pages("5.10-kretprobe"))] == [None] * 4


@kernels
def test_pages_are_held_from_allocation_to_free(kernel):
    events = parse(records.pages(kernel))
    counter = probe(records.TIDS[kernel], events[:3], events[3:5], events[5:6], events[6:])
    vcpu = counter.read_bytes()
    assert vcpu == 4096
    assert counter.read_bytes() - vcpu == 12288
    assert counter.read_bytes() - vcpu == 4096
    assert counter.read_bytes() - vcpu == 0
    assert counter.resolution_bytes() == 0
    assert sum(count for site, count in counter.sites.items() if site.is_nested) == 2


@kernels
def test_sites_that_hold_are_those_that_have_not_freed(kernel):
    events = parse(records.pages(kernel))
    counter = probe(records.TIDS[kernel], events[:5], events[5:])
    assert sum(counter.held_sites().values()) == 3
    assert [site.is_nested for site in counter.held_sites()] == [False]


def test_other_processes_pages_are_not_counted_but_their_frees_are():
    """KVM leaves frees to workers and to RCU."""
    events = parse(records.pages("6.1"))
    counter = probe(1, events[:5])
    assert counter.read_bytes() == 0
    freed_by_a_worker = [TraceEvent(17, e.name, e.fields, e.stack) for e in events[5:]]
    counter = probe(records.TIDS["6.1"], events[3:5], freed_by_a_worker)
    assert counter.read_bytes() == 12288
    assert counter.read_bytes() == 0


@pytest.mark.parametrize("pfn", ["0", "0x0"])
def test_a_refused_allocation_is_counted_apart(pfn):
    *_, page, _, _, _ = parse(records.pages("6.1"))
    refused = TraceEvent(page.tid, page.name, {**page.fields, "pfn": pfn}, page.stack)
    counter = probe(page.tid, [refused, page])
    assert counter.read_bytes() == 4096
    assert sum(counter.refused.values()) == 1
    assert sum(counter.sites.values()) == 1


def test_an_event_without_its_stack_is_an_error_if_it_is_ours():
    [event, *_] = parse(records.pages("6.1"))
    bare = TraceEvent(event.tid, event.name, event.fields)
    assert probe(event.tid + 1, [bare]).read_bytes() == 0
    counter = probe(event.tid, [bare])
    with pytest.raises(HarnessError, match="without its stack"):
        counter.read_bytes()
