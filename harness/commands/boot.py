"""`nsvm boot`: run any freestanding image on a host's KVM."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from harness.commands.options import host_choice, host_options
from harness.host.session import CallResult, Event
from harness.machine.boot import pack_image
from harness.machine.errors import ImageError
from harness.machine.loader import Image, parse_image
from harness.machine.pc import check_image
from harness.machine.pc_run import Ending
from harness.probe.kmsg import new_taints, splats
from harness.runner.hosts import make_host

#: A guest's own statuses, (value << 1) | 1, are odd; these are not.
STATUS_KERNEL = 4
STATUS_SHUTDOWN = 6
STATUS_STOPPED = 8
STATUS_RESET = 10
STATUS_TIMEOUT = 124

_STATUS = {
    Ending.SHUTDOWN: STATUS_SHUTDOWN,
    Ending.STOPPED: STATUS_STOPPED,
    Ending.RESET: STATUS_RESET,
    Ending.TIMEOUT: STATUS_TIMEOUT,
}

#: For the host to set up and tear down around the guest's own time, in seconds.
_CALL_EXTRA_S = 45.0
_MAX_IMAGE_BYTES = 64 << 20


@click.command("boot")
@click.argument("image", type=click.Path(path_type=Path))
@click.option("--append", default="", metavar="ARGS", help="Command line for a multiboot image.")
@click.option("--smp", type=click.IntRange(1, 255), default=1, show_default=True, metavar="N")
@click.option(
    "--memory",
    "memory_mib",
    type=click.IntRange(2, 1 << 20),
    default=128,
    show_default=True,
    metavar="MIB",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0, min_open=True),
    default=90.0,
    show_default=True,
    metavar="S",
    help="Seconds that the guest may take.",
)
@host_options
def command(
    image: Path,
    append: str,
    smp: int,
    memory_mib: int,
    timeout_s: float,
    host: str,
    kernel: str | None,
    modules: Path | None,
) -> None:
    """Boot IMAGE, a multiboot or plain ELF, and print what it writes to its serial port.

    The image finds a PC without PCI and firmware: serial port 0x3f8, debug-exit port 0xf4, PIC,
    PIT, APICs, CMOS, fw_cfg. Images made for `qemu -kernel IMAGE -device isa-debug-exit` run
    unchanged.

    Exit status: (value << 1) | 1 of what the guest wrote to port 0xf4, as QEMU has it, always odd.
    2: not an image, or no host to boot it on. 4: the host's kernel complained (WARN, oops, taint).
    6: triple fault. 8: KVM could not go on. 10: the guest asked for a reset. 124: the guest did not
    end in time. 130: interrupted.
    """
    choice = host_choice(host, kernel, modules)
    name = image.name.replace(" ", "_")
    data = _read(image)
    parsed = parse_image(data, name)
    check_image(parsed, memory_mib, f"{name} {append}")
    with make_host(choice, log=lambda text: click.echo(f"nsvm: {text}", err=True)) as where:
        result = where.start().call(
            "harness.machine.boot:boot",
            timeout_s=timeout_s + _CALL_EXTRA_S,
            on_event=_show,
            image=pack_image(data),
            name=name,
            command_line=append,
            vcpus=smp,
            memory_mib=memory_mib,
            timeout_s_of_guest=timeout_s,
        )
    sys.exit(_status(result, parsed))


def _read(path: Path) -> bytes:
    """Return the image's bytes.

    Raises ImageError: it cannot be read, or is larger than any image.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_IMAGE_BYTES + 1)
    except OSError as e:
        raise ImageError(f"{path}: {e.strerror}") from e
    if len(data) > _MAX_IMAGE_BYTES:
        raise ImageError(f"{path}: more than {_MAX_IMAGE_BYTES >> 20} MiB")
    return data


def _show(event: Event) -> None:
    if event["event"] == "emit" and event["kind"] == "console":
        # Byte for byte what the guest printed, at once.
        sys.stdout.buffer.write(event["data"]["text"].encode("utf-8", "surrogateescape"))
        sys.stdout.buffer.flush()


def _status(result: CallResult, image: Image) -> int:
    """Say how the guest ended, if not as it wanted to, and return the command's exit status."""
    bases = result.error.get("bases", ())
    if "ScenarioFailure" in bases or "KvmError" in bases:
        status = STATUS_STOPPED
        _say(result.error["message"])
    else:
        status = _status_of_end(result.unwrap(f"booting {image.name}"), image)
    said = splats(event["text"] for event in result.kmsg)
    for line in said:
        _say(f"kernel log: {line}")
    return STATUS_KERNEL if said or new_taints(*result.tainted) else status


def _status_of_end(end: dict[str, Any], image: Image) -> int:
    ending = Ending(end["ending"])
    if ending is Ending.EXIT:
        return int(end["exit_code"])
    by_place: dict[str, list[str]] = {}
    for where in end["where"]:
        by_place.setdefault(_place(where, image), []).append(str(where["index"]))
    places = (f"vCPU {', '.join(indices)}: {place}" for place, indices in by_place.items())
    _say("; ".join([f"{image.name}: {end['text']}", *places]))
    return _STATUS[ending]


def _place(where: dict[str, Any], image: Image) -> str:
    symbol = image.symbol_at(where["rip"] + where["cs_base"])
    return f"{where['text']}{f' ({symbol})' if symbol else ''}"


def _say(text: str) -> None:
    click.echo(f"nsvm: {text}", err=True)
