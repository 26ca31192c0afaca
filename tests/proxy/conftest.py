import pytest
from kvm_deadline import process_deadline

from harness.machine.addresses import Gpa
from harness.machine.memory import GuestMemory
from harness.proxy.paging import PageAllocator

DEADLINE_S = 120
MEMORY_BYTES = 8 << 20


@pytest.fixture(autouse=True)
def deadline():
    with process_deadline(DEADLINE_S):
        yield


class SlotsOnly:
    """A VM that takes slots and does nothing with them."""

    def set_user_memory_region(self, slot, gpa, hva, size, flags=0, as_id=0):
        pass

    def delete_memory_region(self, slot, as_id=0):
        pass


@pytest.fixture
def memory():
    with GuestMemory(SlotsOnly()) as made:
        made.add(Gpa(0), MEMORY_BYTES)
        yield made


@pytest.fixture
def pages():
    return PageAllocator(Gpa(0x1000), Gpa(MEMORY_BYTES))


@pytest.fixture(scope="session")
def proxy_image(tmp_path_factory):
    from guest_images import build

    return build("proxy", cache=tmp_path_factory.mktemp("images")).read_bytes()
