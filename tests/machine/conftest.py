import pytest
from kvm_deadline import deadline_of_each

from harness.machine.watchdog import WATCHDOG

deadline = deadline_of_each(60)


@pytest.fixture
def watchdog():
    WATCHDOG.install()
    yield WATCHDOG
    WATCHDOG.uninstall()


class FakeVm:
    """Takes slots as KVM would, and remembers them."""

    def __init__(self):
        self.slots = {}

    def set_user_memory_region(self, slot, gpa, hva, size, flags=0, as_id=0):
        self.slots[as_id, slot] = (gpa, hva, size, flags)

    def delete_memory_region(self, slot, as_id=0):
        del self.slots[as_id, slot]


@pytest.fixture
def fake_vm():
    return FakeVm()
