import pytest
from kvm_deadline import process_deadline

from harness.machine.watchdog import WATCHDOG

DEADLINE_S = 60


@pytest.fixture(autouse=True)
def deadline():
    with process_deadline(DEADLINE_S):
        yield


@pytest.fixture
def watchdog():
    WATCHDOG.install()
    yield WATCHDOG
    WATCHDOG.uninstall()


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A function that builds guest images into a cache of this test run."""
    from guest_images import ElfClass, build

    cache = tmp_path_factory.mktemp("images")

    def get(name, elf_class=ElfClass.ELF64):
        return build(name, elf_class, cache)

    return get


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
