import pytest
from kvm_deadline import deadline_of_each
from slots import IgnoresSlots

from harness.machine.addresses import Gpa
from harness.machine.memory import GuestMemory
from harness.proxy.paging import PageAllocator

MEMORY_BYTES = 8 << 20


deadline = deadline_of_each(120)


@pytest.fixture
def memory():
    with GuestMemory(IgnoresSlots()) as made:
        made.add(Gpa(0), MEMORY_BYTES)
        yield made


@pytest.fixture
def pages():
    return PageAllocator(Gpa(0x1000), Gpa(MEMORY_BYTES))


@pytest.fixture(scope="session")
def proxy_image(tmp_path_factory):
    from guest_images import build

    return build("proxy", cache=tmp_path_factory.mktemp("images")).read_bytes()
