"""`nsvm inspect`: a stream in words."""

import io
import json
import re

import pytest
from click.testing import CliRunner
from forged_stream import SHAPE, nested_in_l2, stream, vcpu_parts
from nsvm_process import nsvm

from harness.commands.inspect import command
from harness.migrate.decode import flag_names
from harness.migrate.inspect import as_json, blocks, compare, inspect_stream
from kvm_ioctl.asm_kvm import (
    NestedStateFlags,
    kvm_msr_entry,
    kvm_regs,
    kvm_segment,
    kvm_sregs2,
    kvm_vcpu_events,
)


def inspected(**changes):
    return inspect_stream(io.BytesIO(stream(**changes)))


def of_vcpu(**changes):
    """The words on vCPU 0, by block and name."""
    found = inspected(vcpus=[vcpu_parts(**changes)] * 2)
    return {block.title: {row.name: row.text for row in block.rows} for block in blocks(found)}


def texts(**changes):
    """The words on vCPU 0 by name, nested state apart, which has the same names."""
    words = of_vcpu(nested=None, **changes)
    return {name: text for title, rows in words.items() if "vCPU 0" in title
            for name, text in rows.items()}  # fmt: skip


def test_where_it_comes_from_and_what_it_is():
    words = of_vcpu()
    assert words["source"] == {"kernel": "6.1", "architecture": "x86_64", "KVM_CAP_XCRS": "1"}
    assert words["machine"]["pages not zero"] == "4"
    assert words["machine"]["sides"] == "early proxies"
    assert words["memory slots"]["0 (as_id 1)"].endswith("3 page(s) not zero, seen in SMM")


def test_registers_and_bits_go_by_name():
    sregs = kvm_sregs2(cr0=0x80000011, cr4=0x20, efer=0x1500)
    sregs.cs = kvm_segment(selector=8, limit=0xFFFFF, type=11, s=1, present=1, l=1, g=1)
    sregs.ldt.unusable = 1
    sregs.gdt.base = 0x7000
    msrs = bytes(kvm_msr_entry(index=0xC0010117, data=0x5000))
    shown = texts(regs=kvm_regs(rip=0x1000).as_bytes(), sregs=sregs.as_bytes(), msrs=msrs)
    assert shown["rip"] == "0x1000"
    assert shown["cs"] == "0x0008 base=0x0 limit=0xfffff attrib=0xa9b (G L P S TYPE=0xb)"
    assert shown["ldt"].endswith(" unusable")
    assert shown["gdt"] == "base=0x7000 limit=0x0"
    assert (shown["cr0"], shown["cr4"]) == ("0x80000011  PG ET PE", "0x20  PAE")
    assert shown["efer"] == "0x1500  SVME LMA LME"
    assert shown["0xc0010117 MSR_VM_HSAVE_PA"] == "0x5000"
    assert shown["SVM"] == "yes"


def test_events():
    events = kvm_vcpu_events(flags=0x1C, exception_has_payload=1, exception_payload=0x10)
    events.exception.pending, events.exception.nr, events.exception.error_code = 1, 14, 2
    events.smi.smm = 1
    shown = of_vcpu(events=events.as_bytes(), nested=None)["vCPU 0: events"]
    assert shown["exception"] == "nr=0xe pending=0x1 error_code=0x2 payload=0x10"
    assert shown["in SMM"] == "yes"
    assert shown["interrupt"] == "none"
    assert shown["flags"] == "0x1c  VALID_SHADOW VALID_SMM VALID_PAYLOAD"


def test_nested_state_in_guest_mode():
    words = of_vcpu()
    nested = words["vCPU 0: nested state"]
    assert nested["flags"] == "0x103  GUEST_MODE RUN_PENDING GIF_SET"
    assert (nested["guest mode"], nested["run pending"]) == ("yes: L2 runs", "yes")
    assert (nested["GIF"], nested["vmcb12 at l1_gpa"]) == ("1", "0x3000")
    control = words["vCPU 0: control area of vmcb12, as cached"]
    assert (control["intercepts"], control["asid"]) == ("intr", "0x1")
    assert "vCPU 0 in L2: registers" in words
    l1 = next(b for b in blocks(inspected()) if "L1's state" in b.title)
    shown = [row.name for row in l1.rows if not row.zero]
    assert shown == ["cs", "efer", "rip"]  # STAR is whatever was there


def test_nested_state_outside_guest_mode():
    outside = nested_in_l2()[:128]
    outside = bytes([0, 0]) + outside[2:4] + (128).to_bytes(4, "little") + outside[8:]
    words = of_vcpu(nested=outside)
    assert words["vCPU 0: nested state"]["guest mode"] == "no: L1 runs"
    assert words["vCPU 0: nested state"]["GIF"] == "0"
    assert "vCPU 0: registers" in words
    assert "vCPU 0: control area of vmcb12, as cached" not in words


def test_flags_without_a_name_are_not_lost():
    assert flag_names(NestedStateFlags, 0x4001, "KVM_STATE_NESTED_") == "GUEST_MODE rest=0x4000"


def test_json_says_all_of_it():
    found = json.loads(json.dumps(as_json(inspected())))
    assert found["shape"] == SHAPE.to_json()
    assert found["state"]["vcpu1.msrs.0xc0000080"] == 0x1500
    assert found["memory"] == {"pages": 4, "pages_by_mapping": [3, 1]}
    assert found["sides"]["proxies"] == {"l1": [1, None, "x"]}
    assert found["words"]["vCPU 0: nested state"]["GIF"] == "1"


# Comparing


def test_the_same_stream_twice_has_no_difference():
    assert compare(inspected(), inspected()) == compare(inspected(), inspected())
    assert compare(inspected(), inspected()).differences == ()


def test_what_differs_is_named_with_both_values():
    other = inspected(
        vcpus=[vcpu_parts(), vcpu_parts(regs=kvm_regs(rax=7).as_bytes())],
        sides={"proxies": {"l1": [2]}},
        source={"architecture": "x86_64", "kernel": "7.3", "capabilities": {}},
        pages=False,
    )
    lines = [str(difference) for difference in compare(inspected(), other).differences]
    assert "vcpu1.regs.rax: 0x0, the other has 0x7" in lines
    assert "source.kernel: '6.1', the other has '7.3'" in lines
    assert "sides.proxies.l1[0]: 0x1, the other has 0x2" in lines
    assert [line.partition(":")[0] for line in lines if line.startswith("page")] == [
        *("page at 0x0", "page at 0x1000", "page at 0x2000", "page at 0x10000")
    ]


def test_time_is_excused_and_said():
    tsc = {"msrs": bytes(kvm_msr_entry(index=0x10, data=5))}
    one, other = (inspected(vcpus=[vcpu_parts(**m)] * 2) for m in (tsc, {"msrs": b""}))
    found = compare(one, other)
    assert found.differences == ()
    assert [e.difference.what for e in found.excused] == ["vcpu0.msrs.0x10", "vcpu1.msrs.0x10"]
    assert "TSC" in found.excused[0].why


# The command


@pytest.fixture
def files(tmp_path):
    def make(**streams):
        for name, data in streams.items():
            (tmp_path / name).write_bytes(data)
        return [str(tmp_path / name) for name in streams]

    return make


def run(*arguments):
    return CliRunner().invoke(command, arguments)


def test_tables_show_what_is_not_zero(files):
    [file] = files(one=stream())
    shown = run(file).output
    assert re.search(r"efer +│ 0x1500  SVME LMA LME", shown)
    assert re.search(r"guest mode +│ yes: L2 runs", shown)
    assert "r15" not in shown
    assert re.search(r"r15 +│ 0x0", run(file, "--all").output)


def test_words_that_look_like_markup_are_shown_as_they_are(files):
    [file] = files(one=stream(sides={"[bold]x[/bold]": 1}))
    assert "[bold]x[/bold]" in run(file).output


def test_json_is_json(files):
    [file] = files(one=stream())
    assert json.loads(run(file, "--json").output)["sections"] == 10


def test_diff_says_so_with_its_status(files):
    tsc = vcpu_parts(msrs=bytes(kvm_msr_entry(index=0x10, data=5)))
    rax = vcpu_parts(regs=kvm_regs(rax=7).as_bytes())
    one, same, other = files(
        one=stream(vcpus=[vcpu_parts()] * 2),
        same=stream(vcpus=[vcpu_parts()] * 2),
        other=stream(vcpus=[rax, tsc]),
    )
    done = run(one, "--diff", same)
    assert (done.exit_code, done.output) == (0, "no difference(s)\n")
    done = run(one, "--diff", other)
    assert done.exit_code == 1
    assert "vcpu0.regs.rax: 0x0, the other has 0x7\n" in done.output
    assert "1 excused difference(s):\n  vcpu1.msrs.0x10: nothing, the other" in done.output
    found = json.loads(run(one, "--diff", other, "--json").output)
    assert {"what": "vcpu0.regs.rax", "one": 0, "other": 7} in found["differences"]
    assert found["excused"][0]["what"] == "vcpu1.msrs.0x10"


@pytest.mark.parametrize(
    ("data", "line"),
    [(b"", "the start: cut off after 0 of 16 bytes"), (stream()[:-1], "cut off after")],
)
def test_what_is_no_stream_is_refused_with_the_files_name(files, data, line):
    [file] = files(one=data)
    done = nsvm("inspect", file)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"nsvm: {re.escape(file)}: .*{line}.*\n", done.stderr)


def test_what_cannot_be_read_is_one_line_too(tmp_path):
    done = nsvm("inspect", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == f"nsvm: cannot read {tmp_path}: Is a directory\n"
