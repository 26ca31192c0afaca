"""The table of fields, and what counts as proof, on images made by hand."""

import ctypes

import pytest

from harness.proxy.vmcb_view import place_of
from harness.race.attempt import Attempt, Plan, attempts_of, exit_saved_it, field_of
from harness.race.code import RECORD_SIZE, race_record
from harness.race.fields import (
    ASID_0_SEEN,
    ASID_SEEN,
    FIELDS,
    READ,
    RIP_ILLEGAL_SEEN,
    RIP_LEGAL_SEEN,
    NoSuchField,
    field_named,
    version_of,
)
from harness.race.race import Finding, Tally, outcome, proof_of
from harness.svm.exit_codes import VMEXIT_INVALID, ExitCode
from harness.svm.vmcb import VMCB_SIZE

RUNNING = 4
"""Number of the attempt."""

LEGAL = {
    "efer": 0x1D00,
    "cr0": 0x8001_0033,
    "cr3": 0x24_2000,
    "cr4": 0x620,
    "dr6": 0xFFFF_0FF0,
    "dr7": 0x400,
    "save.cs.attrib": 0xA9B,
    "intercept.vmrun": 1,
    "asid": 1,
    "save.ds.selector": 0x10,
    "save.gdtr.limit": 0xFF,
    "rip": 0x1000,
}


def changed(image, values):
    """Return an image with fields set."""
    data = bytearray(image)
    for name, value in values.items():
        place = place_of(name)
        at = slice(place.offset, place.offset + place.size)
        old = int.from_bytes(data[at], "little")
        new = old & ~(place.mask << place.shift) | value << place.shift
        data[at] = (new & (1 << 8 * place.size) - 1).to_bytes(place.size, "little")
    return bytes(data)


def spoilt(row, image):
    return changed(
        image, {name: change(field_of(image, name)) for name, change in row.illegal.items()}
    )


def plan_of(row):
    even = changed(bytes(VMCB_SIZE), LEGAL)
    bad = spoilt(row, even)
    offset = place_of(next(iter(row.illegal))).offset // 8 * 8
    legal, illegal = (int.from_bytes(i[offset : offset + 8], "little") for i in (even, bad))
    templates = (even, changed(even, row.odd))
    return Plan(offset, legal, illegal, templates, (illegal, legal), row.hidden)


def attempt(row, image, *, seen=0, here=RUNNING, previous=None, traced_rip=None):
    record = race_record(seq=RUNNING, seen=seen, here=here)
    return Attempt(plan_of(row), record, image, previous, traced_rip)


def ran(row, **values):
    """An L2 that ran with what the template holds, and exited by VMMCALL."""
    image = plan_of(row).templates[0]
    return changed(image, {"exit_code": ExitCode.SVM_EXIT_VMMCALL, "rflags": 2, **values})


@pytest.mark.parametrize("row", FIELDS, ids=lambda row: row.name)
def test_illegal_value_is_one_word_and_differs(row):
    plan = plan_of(row)
    before, after = plan.templates[0], spoilt(row, plan.templates[0])
    words = [n for n in range(0, VMCB_SIZE, 8) if before[n : n + 8] != after[n : n + 8]]
    assert words == [plan.offset]
    assert plan.mask


@pytest.mark.parametrize("row", FIELDS, ids=lambda row: row.name)
def test_write_after_the_whole_vmrun_is_no_hit(row):
    # L2 saw the legal value and waited for the writer: #VMEXIT saved the legal one.
    plan = plan_of(row)
    one = attempt(row, ran(row), seen=plan.legal if not row.loud else ASID_SEEN)
    assert proof_of(row, one) == ""
    assert outcome(one) == "ran"


@pytest.mark.parametrize("row", [r for r in FIELDS if r.checked], ids=lambda row: row.name)
def test_write_before_the_whole_vmrun_is_no_hit(row):
    # The checks refuse it: nothing but the exit code is written, and the field is still illegal.
    image = changed(spoilt(row, plan_of(row).templates[0]), {"exit_code": VMEXIT_INVALID})
    one = attempt(row, image, here=RUNNING - 1)
    assert proof_of(row, one) == ""
    assert outcome(one) == "refused"


@pytest.mark.parametrize("exit_code", [VMEXIT_INVALID, 0xFFFF_FFFF])
def test_refusal_is_seen_with_either_upper_half(exit_code):
    row = field_named("CR0")
    one = attempt(row, changed(plan_of(row).templates[0], {"exit_code": exit_code}), here=0)
    assert one.refused_early


@pytest.mark.parametrize("name", ["EFER", "CR0", "CR4"])
def test_l2_that_reads_the_illegal_value_is_a_hit(name):
    row = field_named(name)
    plan = plan_of(row)
    # What KVM hides of it does not matter.
    assert proof_of(row, attempt(row, ran(row), seen=plan.illegal ^ row.hidden))


@pytest.mark.parametrize("name", ["EFER", "CR0", "CR4", "DR6", "DR7", "CS"])
def test_saved_illegal_value_of_an_l2_that_ran_is_a_hit(name):
    row = field_named(name)
    assert proof_of(row, attempt(row, spoilt(row, ran(row))))


def test_saved_illegal_value_proves_nothing_if_l2_did_not_meet_the_writer():
    row = field_named("DR6")
    late = attempt(row, changed(spoilt(row, ran(row)), {"exit_code": ExitCode.SVM_EXIT_HLT}))
    assert exit_saved_it(late) == ""
    assert outcome(late) == "no writer"
    assert exit_saved_it(attempt(row, spoilt(row, ran(row)), here=RUNNING - 1)) == ""


@pytest.mark.parametrize("name", ["DR7", "CS", "CR4"])
def test_refusal_that_saved_state_is_a_hit(name):
    row = field_named(name)
    image = changed(spoilt(row, ran(row)), {"exit_code": VMEXIT_INVALID})
    assert "after the checks" in proof_of(row, attempt(row, image, here=0))


def test_l1s_cr3_saved_by_a_refusal_is_a_hit():
    row = field_named("CR3")
    image = changed(ran(row), {"exit_code": VMEXIT_INVALID, "cr3": 0x20_0000})
    assert "0x200000" in proof_of(row, attempt(row, image, here=0))


def test_wbinvd_exit_is_a_hit():
    row = field_named("intercepts")
    image = changed(ran(row), {"exit_code": ExitCode.SVM_EXIT_WBINVD})
    assert proof_of(row, attempt(row, image))


def test_cached_asid_0_is_a_hit():
    row = field_named("ASID")
    assert proof_of(row, attempt(row, ran(row), seen=ASID_0_SEEN))
    assert proof_of(row, attempt(row, ran(row), seen=ASID_SEEN)) == ""


@pytest.mark.parametrize(
    ("seen", "traced", "hit"),
    [
        (RIP_LEGAL_SEEN, 0x1000, False),
        (RIP_ILLEGAL_SEEN, 0x1008, False),
        (RIP_ILLEGAL_SEEN, 0x1000, True),
        (RIP_LEGAL_SEEN, 0x1008, True),
        (RIP_LEGAL_SEEN, 0x5000, False),  # an event of something else
        (RIP_LEGAL_SEEN, None, False),
        (0, 0x1008, False),
    ],
)
def test_event_that_disagrees_with_l2s_start_is_a_hit(seen, traced, hit):
    row = field_named("RIP")
    assert bool(proof_of(row, attempt(row, ran(row), seen=seen, traced_rip=traced))) is hit


# Clean bits


def clean_proof(now, before):
    """Attempt 4 is even; `now` and `before` are what the groups hold: 0 even's, 1 odd's."""
    row = field_named("clean")
    templates = plan_of(row).templates
    names = ("save.ds.selector", "save.gdtr.limit", "save.dr7")

    def image(which):
        values = {
            n: field_of(templates[w], n) if isinstance(w, int) else 0x77
            for n, w in zip(names, which, strict=True)
        }
        return ran(row, **values)

    previous = None if before is None else image(before)
    return proof_of(row, attempt(row, image(now), previous=previous))


def test_groups_that_disagree_are_a_hit():
    proof = clean_proof((0, 0, 1), (1, 1, 1))
    assert proof == "save.ds.selector loaded, save.gdtr.limit loaded, save.dr7 kept"


@pytest.mark.parametrize(
    ("now", "before"),
    [
        ((0, 0, 0), (1, 1, 1)),  # all loaded
        ((1, 1, 1), (1, 1, 1)),  # all kept
        ((0, 0, 1), (0, 0, 1)),  # kept from one that was mixed
        ((0, 0, 1), None),  # nothing known of the one before
        ((0, 0, None), (1, 1, 1)),  # a value of neither
    ],
)
def test_groups_that_one_look_explains_are_no_hit(now, before):
    assert clean_proof(now, before) == ""


# The table of kernels


def test_windows_are_of_kernels_that_were_read():
    for row in FIELDS:
        assert set(row.windows) <= set(READ)


@pytest.mark.parametrize(
    ("release", "efer", "cs"),
    [
        ("5.10.0-46-amd64", True, False),
        ("6.1.0-56-amd64", False, True),
        ("6.12.117+deb13-amd64", False, True),
        ("6.6.3", False, True),
        ("7.3.4+deb13-amd64", False, False),
        ("7.9-rc1", False, False),
        ("5.15.0", None, None),  # between two that differ
        ("6.18.15", False, None),
        ("5.4.0", None, None),  # before the first
    ],
)
def test_expected_windows(release, efer, cs):
    assert field_named("EFER").expects_window(release) is efer
    assert field_named("CS").expects_window(release) is cs


@pytest.mark.parametrize(
    ("name", "release", "checked"),
    [
        ("EFER", "5.10.0-46-amd64", True),
        ("EFER", "5.4.0", None),
        ("CS", "5.10.0-46-amd64", False),
        ("CS", "5.15.0", None),
        ("CS", "6.1.0", True),
        ("clean", "6.1.0", False),
    ],
)
def test_expected_checks(name, release, checked):
    assert field_named(name).expects_check(release) is checked


def test_version_with_a_suffix():
    assert version_of("7.0-rc3") == (7, 0)
    assert version_of("6.12.117+deb13-amd64") == (6, 12)
    assert version_of("7.1+") == (7, 1)


def test_names_in_either_case_and_unknown_ones():
    assert field_named("efer").name == "EFER"
    with pytest.raises(NoSuchField, match="no field is called CR9; there are EFER, CR0"):
        field_named("CR9")


# Counting


def test_tally_keeps_the_first_evidence():
    row = field_named("DR6")
    plan = plan_of(row)
    tally = Tally(row)
    hit = attempt(row, spoilt(row, ran(row)))
    tally.count([attempt(row, ran(row)), hit, hit])
    assert (tally.attempts, tally.hits, tally.finding) == (3, 2, Finding.WINDOW)
    told = tally.to_json("5.10.0")
    assert told["outcomes"] == {"ran": 1, "hit": 2}
    assert told["hits_per_1000"] == 666.67
    assert told["window_by_table"] is True
    first = told["first_evidence"]
    assert first["illegal"] == f"{plan.illegal:#x}" == first["saved"]
    assert bytes.fromhex(first["vmcb12_before"]) == plan.templates[0]
    assert bytes.fromhex(first["vmcb12_after"]) == hit.image


def test_records_are_taken_apart():
    row = field_named("CR0")
    plan = plan_of(row)
    raw = bytearray(2 * RECORD_SIZE)
    for n in (0, 1):
        image = ran(row, rip=0x1000 + n)
        record = race_record(seq=n + 1, used=7, seen=n, here=n + 1)
        raw[n * RECORD_SIZE : n * RECORD_SIZE + VMCB_SIZE] = image
        at = n * RECORD_SIZE + VMCB_SIZE
        raw[at : at + ctypes.sizeof(race_record)] = bytes(record)
    first, second = attempts_of(plan, bytes(raw))
    assert first.previous is None
    assert second.previous == first.image
    assert (second.record.seq, second.record.used, second.record.seen) == (2, 7, 1)
    assert second.template == plan.templates[0]
    assert first.template == plan.templates[1]
