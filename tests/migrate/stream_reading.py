"""What a reader says of streams: what it found, or the one line that it refuses them with."""

import io

import pytest
from forged_stream import stream, take_apart

from harness.migrate.errors import Refused, StreamError
from harness.migrate.inspect import inspect_stream
from harness.migrate.sections import expect_inside
from harness.migrate.stream import StreamReader

VALID = stream()
SECTIONS = take_apart(VALID)
LONGEST_LINE = 400


def read(data):
    return inspect_stream(io.BytesIO(data))


def refusal(data):
    """Return the line that a stream is refused with."""
    with pytest.raises((StreamError, Refused)) as caught:
        read(data)
    return one_line(caught.value)


def one_line(error):
    line = str(error)
    assert line
    assert line.isprintable()
    assert len(line) < LONGEST_LINE
    return line


def sections_in_place(data, memory, source=io.BytesIO):
    def place(where, batch):
        expect_inside(where, batch, (len(memory),))
        return batch.views(memoryview(memory))

    return StreamReader(source(data), place).sections()
