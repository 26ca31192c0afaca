"""What is called inside a host for `nsvm tamper`: cells, one after the other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from harness.crosscheck.campaign import facts_here
from harness.crosscheck.settings import Setting
from harness.probe.kmsg import splats
from harness.tamper.rows import Row
from harness.tamper.table import all_cells
from harness.tamper.trial import Trial
from kvm_ioctl.handles import Kvm

Emit = Callable[..., None]

_KMSG: Final = "/dev/kmsg"
_RECORD_BYTES: Final = 8192
_CLEAR_WARN_ONCE: Final = Path("/sys/kernel/debug/clear_warn_once")


class KernelLog:
    """The kernel's complaints, as they come; use it in a `with`."""

    def __init__(self) -> None:
        self._fd = -1

    def __enter__(self) -> KernelLog:
        with contextlib.suppress(OSError):
            self._fd = os.open(_KMSG, os.O_RDONLY | os.O_NONBLOCK)
            os.lseek(self._fd, 0, os.SEEK_END)
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def complaints(self) -> list[str]:
        """Return what there is since the last call; a WARN_ON_ONCE may come again afterwards."""
        found = splats(self._lines())
        if found:
            with contextlib.suppress(OSError):
                _CLEAR_WARN_ONCE.write_text("1")
        return found

    def _lines(self) -> Iterator[str]:
        while self._fd >= 0:
            try:
                record = os.read(self._fd, _RECORD_BYTES)
            except BlockingIOError:
                return
            except OSError:
                # The reader was too slow, and records are gone.
                continue
            text = record.decode(errors="replace")
            yield text.partition(";")[2].splitlines()[0]


def run_cells(
    emit: Emit, *, names: Sequence[str], setting: str, turned: dict[str, str], emulated: bool
) -> int:
    """Run cells by their names; `row` goes out for each, after `begins` (name).

    Raises KeyError: there is no such cell.
    """
    known = {cell.name: cell for cell in all_cells()}
    with Kvm() as kvm, KernelLog() as log:
        trial = Trial(
            kvm,
            Setting(setting, turned).knobs(),
            facts_here(kvm),
            emulated,
            log.complaints,
        )
        for name in names:
            emit("begins", name=name)
            emit("row", **_plain(trial.row(known[name])))
    return len(names)


def facts(emit: Emit) -> dict[str, Any]:
    """Return the facts of a bench's vCPU on this host, for predictions elsewhere."""
    with Kvm() as kvm:
        return vars(facts_here(kvm))


def _plain(row: Row) -> dict[str, Any]:
    return row.to_json()
