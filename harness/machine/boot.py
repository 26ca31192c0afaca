"""Boots an image as a PC inside a host: what `nsvm boot` calls there."""

from __future__ import annotations

import base64
import contextlib
import zlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from harness.errors import HostError
from harness.machine.loader import parse_image
from harness.machine.pc import Pc
from harness.machine.pc_run import PcRunner
from kvm_ioctl.handles import Kvm
from kvm_ioctl.request import KvmError


def pack_image(data: bytes) -> str:
    """Return an image as text that JSON carries."""
    return base64.b64encode(zlib.compress(data)).decode("ascii")


def unpack_image(text: str) -> bytes:
    """Return what `pack_image` was given."""
    return zlib.decompress(base64.b64decode(text))


def boot(
    emit: Callable[..., None],
    image: str,
    name: str,
    command_line: str,
    vcpus: int,
    memory_mib: int,
    timeout_s_of_guest: float,
) -> dict[str, Any]:
    """Boot an image; emit `console` events with what it prints, return the `PcEnd` as a dict.

    Args:
        emit: takes an event's kind and its data.
        image: the ELF as `pack_image` made it.
        name: of the image, for errors and as the first word of the command line.
        command_line: the rest of it.
        vcpus: how many.
        memory_mib: memory in MiB.
        timeout_s_of_guest: seconds until it counts as hung.

    Raises ImageError: the image cannot be loaded.
    Raises HostError: this host cannot give such a machine.
    Raises KvmError: KVM_RUN failed.

    """
    parsed = parse_image(unpack_image(image), name)
    with contextlib.ExitStack() as stack:
        try:
            kvm = stack.enter_context(Kvm())
            line = f"{name} {command_line}"
            pc = Pc(kvm, parsed, vcpus=vcpus, memory_mib=memory_mib, command_line=line)
        except (KvmError, OSError) as e:
            raise HostError(f"no PC with {vcpus} vCPUs and {memory_mib} MiB here: {e}") from e
        stack.enter_context(pc)
        end = PcRunner(pc, lambda text: emit("console", text=text)).run(timeout_s_of_guest)
    return asdict(end)
