"""Mistakes with requests and exits are type errors; mypy is asked about each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvm_ioctl

ROOT = Path(kvm_ioctl.__file__).parents[1]
TIMEOUT_S = 180

PROGRAM = """\
from kvm_ioctl.asm_kvm import kvm_regs, kvm_sregs
from kvm_ioctl.exits import IoExit, RdmsrExit
from kvm_ioctl.handles import Vcpu, Vm

def use(vm: Vm, vcpu: Vcpu) -> None:
    regs: kvm_regs = vcpu.get(Vcpu.KVM_GET_REGS)  # right
    vcpu.call(Vcpu.KVM_SET_REGS, regs)  # right
    vcpu.call(Vcpu.KVM_NMI)  # right
    vcpu.set_regs(vcpu.get_regs())  # right
    vm.call(Vcpu.KVM_SET_REGS, regs)  # wrong
    vcpu.call(Vm.KVM_CREATE_IRQCHIP)  # wrong
    vcpu.call(Vcpu.KVM_SET_REGS, kvm_sregs())  # wrong
    vcpu.try_call(Vcpu.KVM_SET_REGS, kvm_sregs())  # wrong
    vcpu.call(Vcpu.KVM_SET_REGS)  # wrong
    vcpu.call(Vcpu.KVM_NMI, regs)  # wrong
    vcpu.set_regs(kvm_sregs())  # wrong
    sregs: kvm_sregs = vcpu.get_regs()  # wrong

def look_at(io: IoExit, msr: RdmsrExit) -> None:
    port: int = io.port  # right
    io.port = 5  # wrong
    msr.index = 5  # wrong
    IoExit(io.direction, 1, 2, 3)  # wrong
"""


def test_wrong_fd_and_wrong_payload_are_type_errors(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    source = tmp_path / "use.py"
    source.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), str(source)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=os.environ | {"MYPYPATH": str(ROOT)},
    )
    lines = PROGRAM.splitlines()
    reported = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line}
    expected = {number for number, line in enumerate(lines, 1) if line.endswith("# wrong")}
    assert reported == expected, done.stdout + done.stderr
