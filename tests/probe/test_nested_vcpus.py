"""The probe of vCPUs with nested state: what the two functions' calls say."""

from harness.probe.nested_vcpus import BYTES_PER_VCPU, NestedVcpus
from harness.probe.tracefs import TraceEvent


def called(name, svm):
    return TraceEvent(7, name, {"svm": svm})


def counted(*events):
    probe = NestedVcpus()
    for event in events:
        probe._account(event)
    return len(probe._having)


def test_a_vcpu_has_it_from_the_one_call_to_the_other():
    assert counted(called("allocate", "0x1"), called("allocate", "0x2")) == 2
    assert counted(called("allocate", "0x1"), called("free", "0x1")) == 0


def test_calls_that_find_nothing_to_do_do_not_count():
    """A vCPU that is destroyed is freed once more; RSM allocates what is there."""
    assert counted(called("free", "0x1"), called("allocate", "0x2")) == 1
    assert counted(called("allocate", "0x1"), called("allocate", "0x1")) == 1


def test_what_one_costs_is_the_models_word():
    assert BYTES_PER_VCPU == 12288
