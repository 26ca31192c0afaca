"""Who has the machine: what the two ends of a live migration say besides the stream.

The source writes a stream (`stream`) and, after it, one message. The destination only writes
messages::

    source                          destination
    start, HEAD               ->
                              <-    WELCOME    there is a VM of this shape
    PAGE, ..., PREP           ->
                              <-    PREPARED   nothing is left to be read or to be made ready
    PAGE, ..., DONE           ->
                              <-    READY      everything is restored; nothing has run
    COMMIT                    ->               the source has given its VM up
                              <-    RUNNING    it is the destination's machine now

Instead of any of its messages, at any time before COMMIT, the destination may say REFUSED with a
reason, and has nothing any more then. It may even say so afterwards, if COMMIT came too late: it
never does once it has taken the machine. The source says no to everything by closing the link.

Before PREPARED the machine runs, and the source waits; from then on it may be stopped at any time,
and no more happens at the destination than has to.

A message is its length (4 bytes, little-endian), the CRC-32 of what follows (4), and a JSON object:
`{"say": "REFUSED", "why": "..."}`, `why` being there for REFUSED only.

At most one side ever runs the machine:

* before the last byte of COMMIT was handed to the link, the source may go on, for the destination
  runs nothing without a whole COMMIT;
* from then on it may not, unless the destination says REFUSED (`HandoverUnknown` says why);
* the destination may run from a whole COMMIT on, whether or not its RUNNING arrives.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from harness.migrate.errors import Refused, StreamError
from harness.migrate.links import Link

_HEADER: Final = struct.Struct("<II")
_LONGEST_BYTES: Final = 64 << 10
_LONGEST_REASON: Final = 4000


class Say(StrEnum):
    """What can be said."""

    WELCOME = "WELCOME"
    REFUSED = "REFUSED"
    PREPARED = "PREPARED"
    READY = "READY"
    COMMIT = "COMMIT"
    RUNNING = "RUNNING"


_KNOWN: Final = frozenset(Say)


@dataclass(frozen=True)
class Message:
    """One message."""

    say: Say
    why: str = ""
    """The reason of a refusal."""

    def encode(self) -> bytes:
        """Return it as it travels."""
        data = {"say": self.say} | ({"why": self.why[:_LONGEST_REASON]} if self.why else {})
        body = json.dumps(data).encode()
        return _HEADER.pack(len(body), zlib.crc32(body)) + body


SAID: Final = {say: Message(say).encode() for say in Say}
"""What is said while a machine stands still; made beforehand, and known again by its bytes."""
_HEARD: Final = {data[_HEADER.size :]: Message(say) for say, data in SAID.items()}


def put(link: Link, say: Say, why: str = "") -> None:
    """Say something."""
    link.write(Message(say, why).encode() if why else SAID[say])


def take(link: Link) -> Message:
    """Return what the other end says next.

    Raises StreamError: it is no message.
    """
    size, crc = _HEADER.unpack(_exactly(link, _HEADER.size))
    if size > _LONGEST_BYTES:
        raise StreamError(f"{link.name} sent a message of {size} bytes")
    body = _exactly(link, size)
    if zlib.crc32(body) != crc:
        raise StreamError(f"{link.name} sent a message with a wrong checksum")
    return _HEARD.get(body) or _decoded(link, body)


def expect(link: Link, say: Say) -> None:
    """Wait for one thing to be said.

    Raises Refused: that was said instead.
    Raises StreamError: something else was said.
    """
    message = take(link)
    if message.say is Say.REFUSED:
        raise Refused(f"the destination refused: {message.why}")
    if message.say is not say:
        raise StreamError(f"{link.name} said {message.say} where {say} is due")


def _decoded(link: Link, body: bytes) -> Message:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or not set(data) <= {"say", "why"}:
        raise StreamError(f"{link.name} sent a malformed message")
    say, why = data.get("say"), data.get("why", "")
    if not isinstance(why, str) or not isinstance(say, str) or say not in _KNOWN:
        raise StreamError(f"{link.name} sent a malformed message")
    return Message(Say(say), why)


def _exactly(link: Link, size: int) -> bytes:
    data = link.read(size) if size else b""
    while len(data) < size:
        data += link.read(size - len(data))
    return data
