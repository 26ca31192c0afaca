"""What a host needs to run Linux as a guest: one read-only image with a kernel and an initrd.

A tar archive padded to whole pages, so that a host can have it as a disk and show it to its own
guests as memory (`harness.nest.payload` reads it).
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Mapping
from pathlib import Path

from harness.host import bundle
from harness.host.cache import build_file, cache_dir
from harness.host.initrd_build import build_initrd
from harness.host.kernels import Kernel, KernelError
from harness.host.userland import userland

#: A guest needs no driver for its channel, a serial port; those are built in. What QEMU runs has
#: this image as a virtio disk, see `init`.
GUEST_MODULES = ("virtio_pci", "virtio_blk", "kvm_amd")

#: As `harness.nest.payload` calls them; that one runs where this module is not.
KERNEL_MEMBER, INITRD_MEMBER = "kernel", "initrd"
_PAGE = 4096


def payload_release(image: Path | None) -> dict[str, str]:
    """Return what a host's description has of its image: the release of the guests' kernel."""
    return {"guest_linux": image.stem.rpartition("-")[0]} if image else {}


def build_payload(kernel: Kernel, params: Mapping[str, str] | None = None) -> Path:
    """Return the image for `kernel`, built if there is none with this tree's code yet.

    Args:
        kernel: that the guests shall run.
        params: of kvm_amd in the guests.

    Raises KernelError: there is no image of that kernel.
    """
    image = kernel.vmlinux or kernel.bzimage
    if image is None:
        raise KernelError(f"kernel {kernel.release}: no image to boot a guest with")
    code = bundle.build_bundle(userland())
    options = {"nested": "1", **(params or {})}
    initrd = build_initrd(kernel, GUEST_MODULES, options, code.path)
    name = hashlib.sha256(f"{image} {kernel.key} {initrd.name}".encode()).hexdigest()[:16]
    target = cache_dir() / "payload" / f"{kernel.release}-{name}.tar"

    def write(path: Path) -> None:
        for other in path.parent.glob(f"{kernel.release}-*.tar"):
            # Each is large, and of an earlier state of the tree. Who has it open keeps it.
            other.unlink(missing_ok=True)
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for member, source in ((KERNEL_MEMBER, image), (INITRD_MEMBER, initrd)):
                tar.add(source, member)
        with path.open("ab") as file:
            file.write(bytes(-file.tell() % _PAGE))

    return build_file(target, write)
