"""From one kernel to another: a place is saved here, and lived on from there."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness.errors import HarnessError, ScenarioFailure
from harness.machine.errors import MachineError
from harness.migrate.difference import BETWEEN_KERNELS, EXCUSED, state_differences
from harness.migrate.errors import Refused, StreamError
from harness.migrate.orders import NAMED
from harness.migrate.state import capture
from harness.migrate.transfer import Loaded, Saved, load, save
from harness.proxy.checkpoint import remember, resume
from harness.proxy.machine import ProxyMachine
from harness.storm.places import PLACES, Place
from kvm_ioctl.handles import Kvm

SIDE_PROXIES, SIDE_PLACE = "proxies", "place"

_SHOWN = 40


class NoTwin(ScenarioFailure):
    """There is nothing to compare with: KVM fails at a place without any migration."""


@dataclass(frozen=True)
class Departure:
    """A machine that was saved at a place."""

    stream: bytes
    saved: Saved


def place_named(name: str) -> Place:
    """Return a place.

    Raises HarnessError: there is none of that name.
    """
    if name not in PLACES:
        raise HarnessError(f"no place is called {name}; there are {', '.join(PLACES)}")
    return PLACES[name]


def prepare(kvm: Kvm, place: Place) -> tuple[ProxyMachine, dict[str, Any]]:
    """Bring a machine to a place; return it, and what must travel with it.

    That has what a twin saw that stayed and lived on.

    Raises NoTwin: the twin does not live on, though it was not moved at all.
    Raises ScenarioFailure: a guest did what it must not.
    """
    with ProxyMachine(kvm, **place.machine_options) as twin:
        try:
            expected = place.live_on(twin, place.arrive(twin))
        except (ScenarioFailure, MachineError) as e:
            raise NoTwin(f"a machine that is not moved does not get on from there: {e}") from e
    machine = ProxyMachine(kvm, **place.machine_options)
    try:
        state = place.arrive(machine)
        side = {"name": place.name, "state": state, "expected": expected}
        return machine, {SIDE_PROXIES: remember(machine), SIDE_PLACE: side}
    except BaseException:
        machine.close()
        raise


def depart(kvm: Kvm, place: Place) -> Departure:
    """Bring a machine to a place and save it.

    Raises ScenarioFailure: a guest did what it must not.
    Raises KvmError: KVM refused to give something.
    """
    machine, given = prepare(kvm, place)
    file = io.BytesIO()
    with machine, machine.paused():
        saved = save(machine, file, given)
    return Departure(file.getvalue(), saved)


def arrive(kvm: Kvm, stream: bytes, order: str) -> dict[str, Any]:
    """Load a machine and live on; return a row of the table: verdict, why, what did not come along.

    Raises StreamError: the stream is malformed.
    """
    try:
        loaded = load(kvm, io.BytesIO(stream), order=NAMED[order])
    except Refused as e:
        return {"verdict": "refused", "why": str(e)}
    with loaded.machine:
        return settle(loaded)


def settle(loaded: Loaded) -> dict[str, Any]:
    """Live on with a machine that arrived; return a row of the table, as `arrive` does.

    Raises StreamError: it does not say how.
    """
    with loaded.machine.paused():
        excused = (*EXCUSED, *BETWEEN_KERNELS)
        found = state_differences(loaded.state, capture(loaded.machine), excused)
    row = {
        "source": loaded.source["kernel"],
        "notes": [str(note) for note in loaded.notes],
        "changed": [str(difference) for difference in found[:_SHOWN]],
        "changed_count": len(found),
    }
    side = _side(loaded)
    place = place_named(side["name"])
    try:
        with resume(loaded.machine, loaded.sides[SIDE_PROXIES]) as machine:
            seen = place.live_on(machine, side["state"])
    except ScenarioFailure as e:
        return {**row, "verdict": "differs", "why": str(e)}
    return {**row, "seen": seen, **_judge(seen, side["expected"])}


def _side(loaded: Loaded) -> dict[str, Any]:
    side = loaded.sides.get(SIDE_PLACE)
    if (
        SIDE_PROXIES not in loaded.sides
        or not isinstance(side, dict)
        or not {"name", "state", "expected"} <= set(side)
    ):
        raise StreamError("the machine was not saved by `nsvm save`: nobody knows how it goes on")
    return side


def _judge(seen: Sequence[str], expected: Sequence[str]) -> dict[str, str]:
    """Return the verdict on what a machine saw, given what its twin saw, and why."""
    for one, other in zip(seen, expected, strict=False):
        if one != other:
            return {"verdict": "differs", "why": f"saw {one!r}, its twin {other!r}"}
    if len(seen) != len(expected):
        why = f"saw {len(seen)} things, its twin {len(expected)}"
        return {"verdict": "differs", "why": why}
    return {"verdict": "works", "why": ""}
