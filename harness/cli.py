"""`nsvm`: the command line. Each command lives in a module of its own, loaded when it is used."""

from __future__ import annotations

import contextlib
import importlib
import logging
import signal
import sys
from types import FrameType

import click

from harness.errors import HostLost, NsvmError

#: Command, and the module in `harness.commands` that has it under the same name.
_COMMANDS = {
    "bench": "compare the harness's speed with C's and bare QEMU's",
    "boot": "boot an image and print what it says on its serial port",
    "crosscheck": "the model of nested state and a kernel, side by side, step by step",
    "tamper": "change the SMRAM save area before RSM, cell by cell, and see where that leads",
    "compare": "which cases ended differently in several runs, and why",
    "designs": "eager, v1 and today's nested state, measured side by side on one kernel",
    "doctor": "what this machine can do, with evidence and how to mend a no",
    "identify": "which known behaviours of nested SVM the running kernel has",
    "fields": "every field of vmcb12: what VMRUN and KVM_SET_NESTED_STATE take of it",
    "fleet": "run scenarios on many lab machines at once, over Ansible",
    "bisect": "which kernel of the archive made a scenario fail, or mended it",
    "inspect": "what is in the stream of a saved machine",
    "kernel": "kernels for the emulated host",
    "load": "go on with a saved machine on any host, and compare with its twin",
    "list": "the scenarios and their cases",
    "memory": "measure nested-state memory per vCPU",
    "migrate": "storms of migrations, and the table of kernels that take each other's machines",
    "mutants": "put known bugs back into a kernel, and see what notices them",
    "race": "rewrite vmcb12 while VMRUN reads it: does KVM look twice?",
    "nest": "Linux in Linux in Linux, at work at every level",
    "receive": "take a machine that `nsvm send` sends, and let it go on here",
    "replay": "repeat what a cross-check recorded, on any host and kernel",
    "repro": "known bugs by name: what shows each, and does this kernel have it",
    "report": "what changed, host by host: a page, a text, JSON for KernelCI",
    "run": "run scenarios on a host",
    "save": "save a machine with L2 or L3 running to a file",
    "send": "send a machine live to another host, through ssh or a socket",
    "shell": "a Python prompt in a host: drive L1, L2, ... by hand",
    "smi": "storms of SMIs into machines whose nested guests are at work",
}

#: ERROR: the harness or the lab broke, or the command was used wrongly.
STATUS_ERROR = 2


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"harness.commands.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(_COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="nsvm-harness", prog_name="nsvm")
@click.option("-v", "--verbose", is_flag=True, help="Say what is downloaded, built and booted.")
def nsvm(verbose: bool) -> None:
    """Test nested virtualization on AMD: KVM's nested SVM, on silicon or on an emulated host."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="nsvm: %(message)s",
        stream=sys.stderr,
        force=True,
    )


def _terminate(signum: int, frame: FrameType | None) -> None:
    # Unwinds every context manager: hosts are ended, probes give the machine back.
    raise SystemExit(128 + signum)


def main() -> None:
    """Run a command; what is not a bug ends with one line, never with a traceback."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        nsvm(prog_name="nsvm", standalone_mode=False)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except click.ClickException as e:
        e.show()
        sys.exit(STATUS_ERROR)
    except HostLost as e:
        if e.console:
            print(e.console, file=sys.stderr)
        print(f"nsvm: {e}", file=sys.stderr)
        sys.exit(STATUS_ERROR)
    except NsvmError as e:
        print(f"nsvm: {e}", file=sys.stderr)
        sys.exit(STATUS_ERROR)
    except (KeyboardInterrupt, click.Abort):
        print("nsvm: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone; nothing more to say to it.
        with contextlib.suppress(OSError):
            sys.stdout = None
        sys.exit(141)
