"""Damage at random: a damaged stream is refused, with one line."""

import json

import pytest
from forged_stream import (
    Mutator,
    Raw,
    seal,
    section_bytes,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stream_reading import SECTIONS, VALID, one_line, read, refusal

from harness.migrate.errors import Refused, StreamError
from harness.migrate.inspect import as_json, compare


def flipped(at, bit):
    damaged = bytearray(VALID)
    damaged[at] ^= 1 << bit
    return bytes(damaged)


def header_bytes():
    """Every place of the start and of the sections' headers."""
    yield from range(16)
    at = 16
    for section in SECTIONS:
        yield from range(at, at + 24)
        at += 24 + len(section.body)


def test_a_flipped_bit_in_any_byte_of_a_header_is_seen():
    for at in header_bytes():
        refusal(flipped(at, at % 8))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(VALID) - 1), st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_seen(at, bit):
    refusal(flipped(at, bit))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(VALID) - 1))
@example(0)
@example(len(VALID) - 1)
def test_any_truncation_is_seen(size):
    assert "cut off" in refusal(VALID[:size])


def test_more_after_the_end_is_seen():
    assert "more bytes after the end" in refusal(VALID + b"\0")


@pytest.mark.parametrize("number", range(len(SECTIONS)))
def test_a_section_that_is_missing_moved_or_there_twice_is_seen(number):
    raw = [section_bytes(section, i) for i, section in enumerate(SECTIONS)]
    start = VALID[:16]
    refusal(start + b"".join(raw[:number] + raw[number + 1 :]))
    refusal(start + b"".join(raw[: number + 1] + raw[number:]))
    for other in range(number):
        swapped = list(raw)
        swapped[number], swapped[other] = raw[other], raw[number]
        refusal(start + b"".join(swapped))


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_no_stream(data):
    refusal(data)
    refusal(VALID[:16] + data)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_damage_with_right_checksums_is_refused_or_can_be_shown(seed):
    try:
        found = read(Mutator(VALID, seed).mutated())
    except (StreamError, Refused) as e:
        one_line(e)
    else:
        json.dumps(as_json(found), allow_nan=False)
        compare(found, read(VALID))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(SECTIONS) - 1), st.binary(max_size=300))
def test_random_bodies_with_right_checksums_are_refused_in_one_line(number, body):
    sections = list(SECTIONS)
    sections[number] = Raw(sections[number].tag, body)
    try:
        read(seal(sections, recount=False))
    except (StreamError, Refused) as e:
        one_line(e)
