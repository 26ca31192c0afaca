import faulthandler
import os
import sys

import pytest

from harness.machine.addresses import Gpa
from harness.machine.memory import GuestMemory
from harness.proxy.paging import PageAllocator
from kvm_ioctl.handles import Kvm

DEADLINE_S = 120
MEMORY_BYTES = 8 << 20


@pytest.fixture(autouse=True)
def deadline():
    """End the process, with all stacks, if a test hangs: nothing else gets out of KVM_RUN."""
    faulthandler.dump_traceback_later(DEADLINE_S, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()


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


@pytest.fixture
def kvm():
    # Absent is a machine without KVM; there but unusable is a mistake, and Kvm() says which.
    if not os.path.exists("/dev/kvm"):
        pytest.skip("no /dev/kvm on this machine")
    with Kvm() as opened:
        yield opened
