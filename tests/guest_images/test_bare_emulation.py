"""Guest images straight on emulated silicon, without any KVM in between."""

import shutil
import subprocess

import pytest

from guest_images import ElfClass, build
from harness.machine.console import GuestExit
from harness.machine.guest_abi import (
    DEBUG_EXIT_PORT,
    HELLO_STATUS,
    HELLO_TEXT,
    SERIAL_PORT,
    STAGE_PORT,
    Stage,
    Status,
)

pytestmark = pytest.mark.emulated

DEADLINE_S = 60

WALK = [Stage.READY, Stage.SVME_ON, Stage.IN_L2, Stage.L2_EXITED, Stage.SVME_OFF, Stage.DONE]


@pytest.fixture
def boot(tmp_path):
    """A function that boots a guest under QEMU; returns its status, stages and output."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("no qemu-system-x86_64 in PATH")

    def run(name, cpu):
        image = build(name, ElfClass.ELF32, tmp_path)
        stages, serial = tmp_path / "stages", tmp_path / "serial"
        command = (
            f"{qemu} -nodefaults -no-user-config -machine q35 -accel tcg -cpu {cpu} -m 16"
            f" -display none -no-reboot -kernel {image}"
            f" -device isa-debug-exit,iobase={DEBUG_EXIT_PORT:#x},iosize=4"
            f" -chardev file,id=stages,path={stages}"
            f" -device isa-debugcon,iobase={STAGE_PORT:#x},chardev=stages"
            f" -chardev file,id=serial,path={serial}"
            f" -device isa-serial,iobase={SERIAL_PORT:#x},chardev=serial"
        ).split()
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
        return done.returncode, list(stages.read_bytes()), serial.read_text(), done.stderr

    return run


def test_hello_prints_and_exits(boot):
    code, _, text, errors = boot("hello", "max")
    assert (code, text) == (GuestExit(HELLO_STATUS).exit_code, HELLO_TEXT), errors


@pytest.mark.parametrize("npt", ["+npt", "-npt"])
def test_l2_runs_and_exits_with_vmmcall(boot, npt):
    code, stages, _, errors = boot("svme", f"max,+svm,{npt}")
    assert stages == WALK, errors
    assert code == GuestExit(Status.OK).exit_code


def test_without_svm_the_guest_says_so(boot):
    code, stages, _, errors = boot("svme", "max,-svm")
    assert stages == [Stage.READY, Stage.NO_SVM, Stage.DONE], errors
    assert code == GuestExit(Status.NO_SVM).exit_code
