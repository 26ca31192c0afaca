"""This machine's KVM; kernels for tests that boot an emulated host, and a cache of their own."""

import os
import shutil
import signal

import pytest

from harness.errors import NsvmError
from harness.host import machine_lock
from harness.host.bundle import build_images
from harness.host.cache import cache_dir
from harness.host.kernels import resolve
from harness.host.qemu import QEMU
from kvm_ioctl.handles import Kvm

#: What the emulated tests run on: versions as `nsvm --kernel` takes them.
KERNELS = os.environ.get("NSVM_TEST_KERNELS", "5.10,7.3").split(",")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background jobs ignore it, and so would all that is started here to be interrupted.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def own_lock(tmp_path_factory):
    """Tests on this machine's own /dev/kvm keep nobody's runs out, nor the other way round."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(machine_lock.VARIABLE, str(tmp_path_factory.mktemp("lock") / "nsvm"))
        yield


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


@pytest.fixture(scope="session")
def carried_images():
    """Have the guest images where `load_image` finds them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NSVM_IMAGES", str(build_images()))
        yield


@pytest.fixture(scope="session", params=KERNELS)
def kernel(request):
    """A kernel to test with, resolved: a test with it runs once for each of `KERNELS`."""
    return resolved(request.param)


@pytest.fixture(scope="session")
def all_kernels():
    """What to test with, as `--kernel` takes them, the oldest first."""
    return KERNELS


@pytest.fixture(scope="session")
def one_kernel():
    """The first of `KERNELS`, for what does not depend on the kernel."""
    return resolved(KERNELS[0])


def resolved(spec):
    for tool in (QEMU, "setpriv"):
        if shutil.which(tool) is None:
            pytest.fail(f"{tool} is not in PATH: `make test` installs it")
    try:
        return Spec(spec, resolve(spec))
    except NsvmError as e:
        # Not a skip: nothing nested would have been tested, and the run be green.
        pytest.fail(f"kernel {spec} cannot be had: {e}")


class Spec(str):
    """What `--kernel` takes, with the kernel that it is."""

    def __new__(cls, spec, kernel):
        made = super().__new__(cls, spec)
        made.kernel = kernel
        return made


@pytest.fixture
def private_cache(tmp_path, monkeypatch):
    """A cache that shares downloads and kernels with the user's, and no saved states."""
    shared, private = cache_dir(), tmp_path / "cache"
    private.mkdir()
    for entry in shared.iterdir():
        if entry.name not in ("warm", "locks", "initrd", "bundles"):
            (private / entry.name).symlink_to(entry)
    monkeypatch.setenv("NSVM_CACHE", str(private))
    return private
