"""`nsvm shell` at a terminal and from a pipe, on an emulated host."""

import os
import signal
import subprocess
import sys
import time

import pexpect
import pytest

pytestmark = pytest.mark.emulated

#: The first start of a host boots it cold.
START_S = 240
ANSWER_S = 60
PROMPT = ">>> "
PREVIOUS_LINE = "\x10"
COMMAND = ["-m", "harness", "shell", "--host", "emulated", "--kernel"]


@pytest.fixture
def environment(tmp_path):
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "TERM": "dumb",
    }


class Terminal:
    """A shell at a terminal; everything waits with a deadline."""

    def __init__(self, kernel, environment, *options):
        self.child = pexpect.spawn(
            sys.executable,
            [*COMMAND, str(kernel), *options],
            env=environment,
            encoding="utf-8",
            timeout=ANSWER_S,
            dimensions=(50, 200),
        )
        self.child.expect_exact(PROMPT, timeout=START_S)
        self.banner = self.child.before

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.child.close(force=True)

    def type(self, line, prompt=PROMPT):
        """Type a line and return what is printed before the next prompt."""
        self.child.sendline(line)
        self.child.expect_exact(prompt)
        return self.child.before.replace("\r", "").partition("\n")[2]

    def start(self, statement):
        """Type a statement that does not end; return once it is on its way."""
        self.child.sendline(f'print("on its", "way"); {statement}')
        self.child.expect_exact("on its way")

    def interrupt(self):
        """Press ^C and return what is printed before the next prompt."""
        self.child.sendintr()
        self.child.expect_exact(PROMPT)
        return self.child.before.replace("\r", "")

    def status(self):
        """Wait for the end and return the exit status."""
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus


@pytest.fixture
def terminal(one_kernel, environment):
    with Terminal(one_kernel, environment) as terminal:
        yield terminal


def test_a_level_answers_and_a_vmcb_is_printed(terminal, one_kernel):
    assert one_kernel.kernel.release in terminal.banner
    assert terminal.type("1 + 1") == "2\n"
    assert terminal.type("l1.ping()") == "True\n"
    assert terminal.type("hex(l1.rdmsr(Msr.MSR_EFER))") == "'0xd00'\n"
    assert terminal.type('l2 = l1.launch(vmcb={"intercept.cpuid": 1})') == ""
    assert terminal.type("before = snapshot(l2); l2.ping()") == "True\n"
    shown = terminal.type("l2.run_to_exit(cpuid(7))")
    assert shown.startswith("L2 to L1: SVM_EXIT_CPUID")
    assert "  exit_code           0x72  SVM_EXIT_CPUID\n" in shown
    assert "  intercepts          cpuid vmrun vmmcall\n" in shown
    assert "  efer                0x1d00  SVME NX LMA LME\n" in shown
    assert "int_ctl" not in shown
    different = terminal.type("diff(before, l2)")
    assert (
        "control.exit_code           0x0  SVM_EXIT_READ_CR0  ->  0x72  SVM_EXIT_CPUID" in different
    )
    assert "intercepts" not in different
    assert terminal.type("l2.exit.skip(); l2.finish()[0].ok") == "True\n"
    terminal.child.sendline("exit(5)")
    assert terminal.status() == 5


def test_what_goes_wrong_is_one_line_or_a_traceback_and_the_prompt_is_back(terminal):
    assert terminal.type("l1.rdmsr(0x12345678)").startswith("GuestFault: RDMSR(rcx=0x12345678)")
    for line in (
        *("machine.smm", "smm", "diff(l1, l2)", "l1.run(7)", "reboot(memory_mib=2048)"),
        *('l2.vmcb["asid"] = "x"', 'l2.vmcb["intercept.excp.PF"]'),
    ):
        assert terminal.type(line).count("\n") == 1, line
    assert terminal.type("def f(:").endswith("SyntaxError: invalid syntax\n")
    assert terminal.type("1 +").startswith("  File")
    trace = terminal.type("l1.nothing")
    assert trace.startswith("Traceback")
    assert "    l1.nothing\n" in trace
    assert trace.endswith("AttributeError: 'Level' object has no attribute 'nothing'\n")
    assert terminal.type("def f():", prompt="... ") == ""
    assert terminal.type("    return 42", prompt="... ") == ""
    assert terminal.type("") == ""
    assert terminal.type("f()") == "0x2a\n"


def test_interrupt_stops_a_looping_l1_and_it_answers_again(terminal):
    assert terminal.type("l1.write(l1.scratch, 77)") == ""
    terminal.start('l1.exec(bytes.fromhex("ebfe"))')
    said = terminal.interrupt()
    assert "interrupted: vCPU 0: L1\n" in said
    assert "rip=0x" in said
    assert "(started again: L1)" in said
    assert terminal.type("l1.ping()") == "True\n"
    assert terminal.type("l1.read(l1.scratch)") == "0x4d\n"
    assert terminal.type("l2.ping()") == "True\n"


@pytest.mark.parametrize("npt", [True, False])
def test_interrupt_stops_a_looping_l2_and_both_answer_again(terminal, npt):
    terminal.type(f'l2 = l1.launch(npt={npt}, vmcb={{"intercept.cpuid": 1}})')
    assert terminal.type("l2.ping()") == "True\n"
    terminal.start("l2.run(loop(1 << 60, [nop()]))")
    said = terminal.interrupt()
    assert "interrupted: vCPU 0: L2\n" in said
    assert "(started again: L1, L2)" in said
    assert terminal.type("l1.ping(), l2.ping(), l1.ping()") == "(True, True, True)\n"
    # What the user had asked for is still so.
    assert terminal.type("l2.run_to_exit(cpuid(0)).name") == "'SVM_EXIT_CPUID'\n"


def test_interrupt_stops_a_looping_l3(terminal):
    assert terminal.type("l3.ping()") == "True\n"
    terminal.start('l3.exec(bytes.fromhex("ebfe"))')
    assert "(started again: L1, L2, L3)" in terminal.interrupt()
    assert terminal.type("l3.ping(), l2.ping(), l1.ping()") == "(True, True, True)\n"


def test_interrupt_ends_loops_in_python(terminal):
    for body in ("pass", "l1.ping()", "l1.ping(), l2.ping()", "time.sleep(60)"):
        terminal.type("import time")
        terminal.type("def spin():", prompt="... ")
        terminal.type(f"    while True: {body}", prompt="... ")
        terminal.type("")
        terminal.start("spin()")
        assert "interrupted" in terminal.interrupt()
        assert terminal.type("l1.ping(), l2.ping()") == "(True, True)\n"


def test_interrupt_at_the_prompt_forgets_what_was_typed(terminal):
    assert terminal.type("for i in range(3):", prompt="... ") == ""
    terminal.interrupt()
    assert terminal.type("1 + 1") == "2\n"


def test_a_dead_guest_is_said_and_starts_again(terminal):
    said = terminal.type("l1.run(triple_fault())")
    assert said.startswith("GuestStopped: ")
    assert "restart()" in said
    said = terminal.type("l1.ping()")
    assert said.startswith("LevelBusy: L1 is in the middle of a program, at operation 0: TRIPLE_F")
    assert "restart()" in said
    assert terminal.type("restart()") == "started again: L1\n"
    assert terminal.type("l1.ping(), l2.ping()") == "(True, True)\n"
    assert terminal.type("reboot(smm=True)") == (
        "<machine with 1 vCPU, 64 MiB, SMM; vCPU 0 has L1, SMM>\n"
    )
    assert terminal.type("machine.inject_smi().name") == "'SMM'\n"
    assert terminal.type("smm.rsm().name, l1.ping()") == "('L1', True)\n"


def test_tab_completes_names_attributes_and_vmcb_fields(terminal):
    child = terminal.child
    for typed, completed in [
        ("mach\t.vcpus[0].index", "0\n"),
        ("l1.rdm\t0x10) > 0", "True\n"),
        ('l2.vmcb["intercept.sel\t', None),
    ]:
        child.send(typed)
        child.send("\n" if completed else "]\n")
        child.expect_exact(PROMPT)
        assert child.before.replace("\r", "").partition("\n")[2] == (completed or "0\n")


def test_lines_are_remembered_and_the_end_of_the_input_ends(one_kernel, environment):
    with Terminal(one_kernel, environment) as terminal:
        assert terminal.type("6 * 7") == "0x2a\n"
        terminal.child.sendeof()
        assert terminal.status() == 0
    with Terminal(one_kernel, environment) as terminal:
        terminal.child.send(f"{PREVIOUS_LINE}\n")
        terminal.child.expect_exact(PROMPT)
        assert "0x2a" in terminal.child.before


def piped(kernel, environment, text, *options):
    done = subprocess.run(
        [sys.executable, *COMMAND, str(kernel), *options],
        input=text,
        capture_output=True,
        text=True,
        env=environment,
        timeout=START_S,
    )
    return done.returncode, done.stdout, done.stderr


def test_from_a_pipe_statements_run_and_print(kernel, environment):
    text = "def f(level):\n    return level.ping()\nf(l1), f(l2)\nprint(l1.cpuid(0)['rax'] > 0)\n"
    assert piped(kernel, environment, text) == (0, "(True, True)\nTrue\n", "")


@pytest.mark.parametrize(
    ("text", "status", "out", "err"),
    [
        ("print(1)\nl1.rdmsr(0x12345678)\nprint(2)\n", 1, "1\n", "GuestFault: RDMSR"),
        ("print(1\n", 1, "", "SyntaxError"),
        ("print(1)\nexit(7)\nprint(2)\n", 7, "1\n", ""),
        ("", 0, "", ""),
    ],
)
def test_from_a_pipe_the_first_that_raises_ends_it(one_kernel, environment, text, status, out, err):
    seen = piped(one_kernel, environment, text)
    assert (seen[0], seen[1]) == (status, out)
    assert err in seen[2]


def test_from_a_pipe_a_statement_has_a_deadline(one_kernel, environment):
    started = time.monotonic()
    for text in ("while True: pass", 'l1.exec(bytes.fromhex("ebfe"))'):
        status, _, err = piped(one_kernel, environment, text, "--timeout", "2")
        assert status in (1, 130)
        assert "interrupted" in err or "did not stop within 2 s" in err
    assert time.monotonic() - started < START_S


def test_sigterm_ends_it_and_its_host(one_kernel, environment):
    with Terminal(one_kernel, environment) as terminal:
        terminal.child.kill(signal.SIGTERM)
        assert terminal.status() == 143
