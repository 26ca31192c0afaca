import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.machine.addresses import Gpa
from harness.machine.errors import MachineError
from harness.proxy.permissions import Iopm, Msrpm, msrpm_bit
from harness.svm.vmcb import IOPM_SIZE, MSRPM_SIZE

covered = st.sampled_from([0, 0xC000_0000, 0xC001_0000]).flatmap(
    lambda first: st.integers(first, first + 0x1FFF)
)
settings_ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@pytest.mark.parametrize(
    ("index", "byte", "bit"),
    [  # APM vol. 2, table 15-7: 2 bits per MSR
        (0x0000_0000, 0x0000, 0),
        (0x0000_1FFF, 0x07FF, 6),
        (0xC000_0000, 0x0800, 0),
        (0xC000_0080, 0x0820, 0),
        (0xC001_0117, 0x1045, 6),
    ],
)
def test_bits_lie_where_the_manual_says(index, byte, bit):
    assert msrpm_bit(index) == byte * 8 + bit


@settings_
@given(covered, covered, st.booleans())
def test_an_msr_has_bits_of_its_own(memory, index, other, write):
    msrpm = Msrpm(memory, Gpa(0x1000))
    msrpm.fill(False)
    msrpm.intercept(index, read=not write, write=write)
    assert msrpm.intercepts(index, write)
    assert not msrpm.intercepts(index, not write)
    assert msrpm.intercepts(other, write) == (other == index)
    msrpm.intercept(index, on=False)
    assert msrpm.read() == bytes(MSRPM_SIZE)


def test_msrs_beyond_the_map_always_exit_and_cannot_be_set(memory):
    msrpm = Msrpm(memory, Gpa(0x1000))
    assert msrpm.intercepts(0x1234_5678, False)
    with pytest.raises(MachineError, match="no bits"):
        msrpm.intercept(0x4000_0000)


@settings_
@given(st.integers(0, 0xFFFF), st.sampled_from([1, 2, 4]))
def test_a_port_access_exits_if_one_of_its_bytes_does(memory, port, size):
    iopm = Iopm(memory, Gpa(0x1000))
    iopm.fill(False)
    iopm.intercept(port + size - 1)
    assert iopm.intercepts(port, size)
    assert not iopm.intercepts(port + size, 1)
    assert len(iopm.read()) == IOPM_SIZE
