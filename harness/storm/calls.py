"""What is called inside a host for `nsvm migrate`, `nsvm save`, `nsvm load` and `nsvm smi`."""

from __future__ import annotations

import base64
import zlib
from typing import Any

from harness.migrate import live
from harness.migrate.dirty import Tracking
from harness.migrate.errors import Refused
from harness.storm.bounce import Emit, Plan
from harness.storm.bounce import storm as blow
from harness.storm.relay import relayed
from harness.storm.smi_storm import SmiPlan, smi_storm
from harness.storm.travel import arrive, depart, place_named, prepare, settle
from harness.storm.workload import Kind
from kvm_ioctl.handles import Kvm


def storm(
    emit: Emit, *, moves: int, levels: int, npt: bool, tracking: str, seed: int
) -> dict[str, Any]:
    """Move a machine at work to and fro between two processes; see `bounce`."""
    return blow(emit, Plan(moves, Kind(levels, npt), seed, Tracking(tracking)))


def storm_of_smis(
    emit: Emit, *, smis: int, levels: int, npt: bool, save_area: bool, seed: int
) -> dict[str, Any]:
    """Send SMIs to a machine at work; see `smi_storm`."""
    with Kvm() as kvm:
        return smi_storm(emit, kvm, SmiPlan(smis, Kind(levels, npt), seed, save_area))


def depart_from(emit: Emit, *, place: str) -> dict[str, Any]:
    """Save a machine at a place; return the stream, packed."""
    with Kvm() as kvm:
        departure = depart(kvm, place_named(place))
    return {
        "stream": pack(departure.stream),
        "pages": departure.saved.pages,
        "size_bytes": departure.saved.size_bytes,
        "notes": [str(note) for note in departure.saved.state.notes],
    }


def arrive_at(emit: Emit, *, stream: str, order: str = "default") -> dict[str, Any]:
    """Load a machine and live on; return how it went, see `travel.arrive`."""
    with Kvm() as kvm:
        return arrive(kvm, unpack(stream), order)


def pack(data: bytes) -> str:
    """Return bytes as text, for the way in or out of a host."""
    return base64.b64encode(zlib.compress(data, 1)).decode("ascii")


def unpack(text: str) -> bytes:
    """Return the bytes that `pack` was given."""
    return zlib.decompress(base64.b64decode(text))


def send_live(emit: Emit, *, place: str) -> dict[str, Any]:
    """Bring a machine to a place and send it on over a relayed link."""
    chosen = place_named(place)
    with Kvm() as kvm:
        machine, given = prepare(kvm, chosen)
        with machine:
            sent = live.send(machine, relayed(emit, "the other host"), sides=lambda: given)
            sent.abandon()
    return {
        "downtime_s": sent.downtime_s,
        "size_bytes": sent.size_bytes,
        "notes": [str(note) for note in sent.state.notes],
    }


def receive_live(emit: Emit) -> dict[str, Any]:
    """Take a machine from a relayed link and live on; return what it saw, see `travel.settle`."""
    with Kvm() as kvm:
        try:
            received = live.receive(kvm, relayed(emit, "the other host"))
        except Refused as e:
            return {"verdict": "refused", "why": str(e)}
        return settle(received)
