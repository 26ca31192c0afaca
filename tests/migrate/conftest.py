import faulthandler
import os
import sys

import pytest

from kvm_ioctl.handles import Kvm

DEADLINE_S = 120


@pytest.fixture(autouse=True)
def deadline():
    """End the process, with all stacks, if a test hangs: nothing else gets out of KVM_RUN."""
    faulthandler.dump_traceback_later(DEADLINE_S, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def kvm():
    # Absent is a machine without KVM; there but unusable is a mistake, and Kvm() says which.
    if not os.path.exists("/dev/kvm"):
        pytest.skip("no /dev/kvm on this machine")
    with Kvm() as opened:
        yield opened


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A function that builds guest images into a cache of this test run."""
    from guest_images import ElfClass, build

    cache = tmp_path_factory.mktemp("images")

    def get(name, elf_class=ElfClass.ELF64):
        return build(name, elf_class, cache)

    return get
