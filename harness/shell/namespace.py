"""The names at the prompt: a machine and its levels, made when they are first used, and helpers."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, Final

from harness.errors import NsvmError
from harness.proxy import program
from harness.proxy.guest_level import GuestLevel
from harness.proxy.level import Level
from harness.proxy.machine import ProxyMachine
from harness.proxy.ops import Policy
from harness.proxy.smm import SmmLevel
from harness.shell.restart import restart
from harness.shell.show import block_of, text_of, vmcb_difference
from harness.svm.exit_codes import ExitCode
from harness.svm.intercepts import Intercept
from harness.svm.msrs import Cr0, Cr4, Efer, Msr
from harness.svm.vmcb import EventInj, IntCtl, IntState, NestedCtl, vmcb
from kvm_ioctl.handles import Kvm, Vcpu

LEVELS: Final = {f"l{depth}": depth for depth in range(1, 6)}
"""Levels that are launched, by the one above, when they are first named."""

_MACHINE_NAMES: Final = {"machine": ProxyMachine, "l1": Level, "smm": SmmLevel} | dict.fromkeys(
    [name for name, depth in LEVELS.items() if depth > 1], GuestLevel
)

_PROGRAM: Final = (
    *("rdmsr", "wrmsr", "cpuid", "rdtsc", "read_cr", "write_cr", "read_dr", "write_dr"),
    *("load", "store", "copy", "fill", "atomic_add", "inb", "outb", "simple", "vmmcall", "vmrun"),
    *("nop", "loop", "spin_until", "exec_at", "set_policy", "triple_fault", "wait_interrupt"),
)
_CONSTANTS: Final = (
    *(ExitCode, Intercept, Msr, Policy),
    *(Efer, Cr0, Cr4, IntCtl, IntState, NestedCtl, EventInj),
)

_OVERVIEW: Final = """\
machine          the VM: machine.vcpus, machine.memory, machine.inject_smi(), ...
l1               L1; l1.rdmsr(0xC0000080), l1.cpuid(0x8000000A), l1.run([...]), l1.<Tab>
l2, l3, l4, l5   launched by the level above when first used; or l2 = l1.launch(vmcb={...}, ...)
kvm, vcpu        /dev/kvm, and vCPU 0: vcpu.get_regs(), vcpu.get_nested_state(), ...
smm              the SMI handler, with smm=True: machine.inject_smi(), smm.save_area, smm.rsm()
l2.vmcb          the VMCB; l2.vmcb["intercept.cpuid"] = 1, l2.run_to_exit(cpuid(0)), l2.finish()

show(x)          a VMCB (of a level, an exit, ...) or another value, decoded, without what is zero
diff(a, b)       the fields in which two VMCBs differ; s = snapshot(l2) keeps one as it is now
restart()        levels that do not answer start again; memory and intercepts stay as they are
reboot(...)      a new machine: reboot(vcpus=2, smm=True, irqchip=True, memory_mib=64, cpuid=...)
help(x)          what x is, and how it is called
exit()           or ^D ends. ^C stops a guest that does not stop by itself.
"""


class Exit:
    """`exit`, with or without parentheses in mind."""

    def __call__(self, status: int | str | None = None) -> None:
        """End the shell with an exit status."""
        raise SystemExit(status)

    def __repr__(self) -> str:
        return "exit() or ^D ends"


class Workbench:
    """The KVM and the current machine, with what is known by name at the prompt."""

    def __init__(self, timeout_s: float, **options: Any) -> None:
        """Open /dev/kvm; the machine follows with its first use.

        Args:
            timeout_s: how long a program in a guest may run.
            options: of `ProxyMachine`.

        """
        self._stack = ExitStack()
        self._machine: ProxyMachine | None = None
        self._options = {"timeout_s": timeout_s, **options}
        self.kvm = self._stack.enter_context(Kvm())
        self.names = Namespace(self)

    def __enter__(self) -> Workbench:
        return self

    def __exit__(self, *_: object) -> None:
        self.names.clear()
        self._close_machine()
        self._stack.close()

    @property
    def machine(self) -> ProxyMachine:
        """The current machine."""
        if self._machine is None:
            self._machine = ProxyMachine(self.kvm, **self._options)
        return self._machine

    def kick(self) -> None:
        """Stop every vCPU that runs; from another thread than theirs."""
        if self._machine is not None:
            for runner in self._machine.vcpus:
                runner.kick()

    @property
    def at_rest(self) -> bool:
        """Whether the level that spoke last, on every vCPU, waits for a program."""
        levels = [cpu.current for cpu in self._machine.cpus] if self._machine else []
        return all(level is None or level.instance.idle for level in levels)

    def recover(self) -> list[str]:
        """Start levels again that do not answer; return their names. See `restart`."""
        return restart(self._machine) if self._machine is not None else []

    # At the prompt

    def reboot(self, **options: Any) -> ProxyMachine:
        """Make a new machine in place of the current one; options are those of `ProxyMachine`."""
        self._close_machine()
        self._machine = ProxyMachine(self.kvm, **{**self._options, **options})
        return self._machine

    def restart(self) -> None:
        """Start levels again that do not answer; memory and intercepts stay as they are."""
        print(f"started again: {', '.join(self.recover()) or 'nothing, nothing had run'}")

    def _close_machine(self) -> None:
        self.names.forget_machine()
        if self._machine is not None:
            self._machine.close()
            self._machine = None


class Namespace(dict[str, Any]):
    """The globals of what is typed; names of the machine are looked up when they are used."""

    def __init__(self, bench: Workbench) -> None:
        super().__init__(__name__="__console__", __doc__=None)
        self._bench = bench
        self.update({name: getattr(program, name) for name in _PROGRAM})
        self.update({kind.__name__: kind for kind in _CONSTANTS})
        self.update(
            kvm=bench.kvm,
            show=show,
            diff=diff,
            snapshot=snapshot,
            restart=bench.restart,
            reboot=bench.reboot,
            help=explain,
            exit=Exit(),
            quit=Exit(),
        )

    def __missing__(self, name: str) -> Any:
        if name == "machine":
            return self._bench.machine
        if name == "smm":
            return self._bench.machine.smm
        if name == "vcpu":
            return self._bench.machine.vcpus[0].vcpu
        if name in LEVELS:
            return self._bench.machine.level(LEVELS[name])
        raise KeyError(name)

    def forget_machine(self) -> None:
        """Drop what the user bound to names of a machine that ends: `l2 = l1.launch(...)`."""
        for name in (*_MACHINE_NAMES, "vcpu"):
            self.pop(name, None)

    def for_completion(self) -> dict[str, Any]:
        """Return all names; for what would have to be made its class is there."""
        return {**_MACHINE_NAMES, "vcpu": Vcpu, **self}


def show(value: object, other: object = None) -> None:
    """Print a value decoded; with another VMCB, what is different there."""
    if other is not None:
        diff(value, other)
        return
    block = block_of(value)
    print(text_of(value if block is None else block))


def diff(old: object, new: object) -> None:
    """Print the fields in which two VMCBs differ: of levels, exits, views or snapshots."""
    blocks = [snapshot(value) for value in (old, new)]
    print(vmcb_difference(*blocks))


def snapshot(value: object) -> vmcb:
    """Return a copy of the VMCB of a level, an exit or a view, as it is now.

    Raises NsvmError: the value has none.
    """
    block = block_of(value)
    if block is None:
        raise NsvmError(f"{type(value).__name__} has no VMCB")
    return block


def explain(value: object = None) -> None:
    """Print what there is, or how something is called and what it does."""
    print(overview() if value is None else _described(value))


def overview() -> str:
    """Return what there is at the prompt."""
    constants = [kind.__name__ for kind in _CONSTANTS]
    lists = {"operations": _wrapped(_PROGRAM), "names": _wrapped(constants)}
    return "\n".join([_OVERVIEW, *(f"{head:<17}{text}" for head, text in lists.items())])


def _wrapped(names: Iterable[str], width: int = 70) -> str:
    lines = [""]
    for name in names:
        if len(lines[-1]) + len(name) > width:
            lines.append("")
        lines[-1] += f"{name} "
    return ("\n" + " " * 17).join(line.rstrip() for line in lines)


def _described(value: object) -> str:
    kind = value if inspect.isroutine(value) or inspect.isclass(value) else type(value)
    try:
        # Annotations are strings, with quotes that nobody wants to read.
        head = f"{kind.__qualname__}{inspect.signature(kind)}".replace("'", "")
    except (TypeError, ValueError):
        head = kind.__qualname__
    lines = [head, inspect.getdoc(kind) or ""]
    if kind is type(value) or inspect.isclass(value):
        public = [name for name in dir(kind) if not name.startswith("_")]
        lines += ["", _wrapped(public)] if public else []
    return "\n".join(lines).rstrip()
