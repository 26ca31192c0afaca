import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from click.testing import CliRunner

from guest_images import ElfClass, build
from harness.commands import boot
from harness.errors import NsvmError
from harness.host.machine_lock import local_path, machine_lock
from harness.host.session import CallResult
from harness.machine.guest_abi import DEBUG_EXIT_PORT
from harness.machine.loader import raw_image

DEADLINE_S = 240


@pytest.fixture(scope="session")
def pc_image(tmp_path_factory):
    return build("pc", ElfClass.ELF32, tmp_path_factory.mktemp("images"))


def start(*arguments, **options):
    command = [sys.executable, "-m", "harness", "boot", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **options
    )


def nsvm_boot(*arguments):
    """Return status, standard output and standard error of the command."""
    process = start(*arguments)
    out, err = process.communicate(timeout=DEADLINE_S)
    return process.returncode, out, err.decode()


# Images that are none


@pytest.fixture
def no_host(monkeypatch):
    monkeypatch.setattr(boot, "make_host", lambda *a, **k: pytest.fail("a host was made"))


@pytest.mark.usefixtures("no_host")
@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (lambda data: b"#!/bin/sh\n", [], "an image.elf: not an ELF file"),
        (lambda data: data[:200], [], "truncated"),
        (lambda data: data[:64] + b"\0\0\0\x70" + data[68:], [], "is outside memory"),  # p_paddr
        (lambda data: data, ["--append", "x" * 20000], "too long for multiboot"),
    ],
)
def test_what_cannot_be_booted_is_refused_before_there_is_a_host(
    tmp_path, pc_image, spoil, options, message
):
    image = tmp_path / "an image.elf"
    image.write_bytes(spoil(pc_image.read_bytes()))
    done = CliRunner().invoke(boot.command, [str(image), *options])
    assert isinstance(done.exception, NsvmError)
    assert message.replace("an image", "an_image") in str(done.exception)
    assert "\n" not in str(done.exception)


@pytest.mark.usefixtures("no_host")
def test_a_file_that_is_not_there_is_refused(tmp_path):
    done = CliRunner().invoke(boot.command, [str(tmp_path / "nothing")])
    assert str(done.exception) == f"{tmp_path}/nothing: No such file or directory"


def test_such_a_refusal_is_one_line_and_status_2(tmp_path):
    (tmp_path / "image").write_bytes(b"nothing")
    assert nsvm_boot(tmp_path / "image") == (2, b"", "nsvm: image: not an ELF file\n")


# How an end becomes a status


def ended(ending, **more):
    value = {"ending": ending, "text": "the text", "exit_code": None, "where": [], **more}
    return CallResult("return", value)


WHERE = [
    {"index": index, "rip": 0x100000 + at, "cs_base": 0, "text": f"at {0x100000 + at:#x}"}
    for index, at in ((0, 3), (1, 1), (2, 1))
]


@pytest.fixture
def image():
    return replace(raw_image(bytes(16), 0x100000), name="it", symbols={"start": 0x100000})


@pytest.mark.parametrize(
    ("result", "status", "said"),
    [
        (ended("exit", exit_code=85), 85, ""),
        (
            ended("timeout", where=WHERE),
            124,
            "nsvm: it: the text; vCPU 0: at 0x100003 (start+0x3); "
            "vCPU 1, 2: at 0x100001 (start+0x1)\n",
        ),
        (ended("shutdown"), 6, "nsvm: it: the text\n"),
        (ended("stopped"), 8, "nsvm: it: the text\n"),
        (ended("reset"), 10, "nsvm: it: the text\n"),
        (
            CallResult("raise", error={"bases": ["KvmError"], "message": "KVM_RUN: EFAULT"}),
            8,
            "nsvm: KVM_RUN: EFAULT\n",
        ),
    ],
)
def test_every_end_has_a_status_and_a_line(image, capsys, result, status, said):
    assert boot._status(result, image) == status
    assert capsys.readouterr().err == said


def test_a_complaint_of_the_kernel_counts_more_than_the_guest(image, capsys):
    result = ended("exit", exit_code=1)
    result.kmsg = [{"text": "WARNING: CPU: 0 PID: 1 at arch/x86/kvm/x86.c:1 f+0x1/0x2 [kvm]"}]
    assert boot._status(result, image) == 4
    assert capsys.readouterr().err.startswith("nsvm: kernel log: WARNING: CPU: 0")


def test_a_lost_call_is_an_error(image):
    with pytest.raises(NsvmError, match="booting it: timeout"):
        boot._status(CallResult("timeout"), image)


# With a KVM


@pytest.fixture
def local_kvm():
    if not os.path.exists("/dev/kvm"):
        pytest.skip("no /dev/kvm on this machine")


@pytest.mark.kvm
@pytest.mark.usefixtures("local_kvm")
def test_a_guest_prints_and_ends_the_command(pc_image):
    status, out, err = nsvm_boot(
        pc_image, "--host", "local", "--smp", "2", "--append", "status=20 and more"
    )
    assert (status, err) == (41, "")
    assert b"arguments: status=20 and more\n" in out
    assert out.endswith(b"CPUs online: 2\nIPIs: ok\n")


@pytest.mark.kvm
@pytest.mark.usefixtures("local_kvm")
def test_a_run_that_has_this_machine_is_not_disturbed(pc_image):
    """Whether the kernel complains is part of the status: this wants the machine for itself."""
    with machine_lock(local_path(), {"who": "eve@far", "command": "nsvm memory"}):
        status, out, err = nsvm_boot(pc_image, "--host", "local")
    said = f"nsvm: in use by eve@far (nsvm memory); lock {local_path()}\n"
    assert (status, out, err) == (2, b"", said)


@pytest.mark.kvm
@pytest.mark.usefixtures("local_kvm")
def test_a_hang_is_one_line_with_a_place(pc_image):
    status, _, err = nsvm_boot(pc_image, "--host", "local", "--append", "hang", "--timeout", "1.5")
    assert status == 124
    assert err.startswith(f"nsvm: {pc_image.name}: the guest did not end within 1.5 s; vCPU 0: at ")
    assert err.endswith(" (hang+0x0)\n")
    assert err.count("\n") == 1


@pytest.mark.kvm
@pytest.mark.usefixtures("local_kvm")
def test_ctrl_c_ends_it(pc_image):
    process = start(
        pc_image, "--host", "local", "--append", "hang", "--timeout", "100", start_new_session=True
    )
    while (line := process.stdout.readline()) != b"IPIs: ok\n":
        assert line, process.stderr.read()
    os.kill(process.pid, signal.SIGINT)
    # Well before its own timeout.
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip()) == (130, b"nsvm: interrupted")


def on_bare_qemu(image, cpus, memory_mib, append):
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("no qemu-system-x86_64 in PATH")
    command = [
        *f"{qemu} -nodefaults -no-user-config -machine q35 -accel tcg -cpu max".split(),
        *f"-smp {cpus} -m {memory_mib} -display none -no-reboot -serial stdio".split(),
        *f"-device isa-debug-exit,iobase={DEBUG_EXIT_PORT:#x},iosize=4".split(),
        *("-kernel", str(image), "-append", append),
    ]
    done = subprocess.run(command, capture_output=True, timeout=DEADLINE_S)
    return done.returncode, done.stdout


@pytest.mark.emulated
def test_bare_qemu_and_an_emulated_host_show_the_same(pc_image):
    """The same image, unchanged: same output, same status; on the local KVM too if there is one."""
    expected = on_bare_qemu(pc_image, 3, 64, "status=9")
    assert expected[0] == 19
    assert expected[1].endswith(b"CPUs online: 3\nIPIs: ok\n")
    hosts = ["emulated"] + (["local"] if os.path.exists("/dev/kvm") else [])
    for host in hosts:
        options = ("--smp", 3, "--memory", 64, "--append", "status=9", "--host", host)
        status, out, err = nsvm_boot(pc_image, *options)
        assert (status, out) == expected, (host, err)
