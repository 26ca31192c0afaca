"""Checks every size, offset, request number and constant declared here against kernel headers.

Each fact is one C expression and its value: ``offsetof(struct kvm_regs, rip)`` is 128. The facts
that the declarations claim are compared with ``abi.json``, which was recorded from the headers of a
named kernel, and with any other headers by compiling the expressions::

    python -m kvm_ioctl.abi --headers /usr/include
    python -m kvm_ioctl.abi --headers DIR --write
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from pathlib import Path
from types import ModuleType
from typing import Any

from kvm_ioctl import (
    asm_kvm,
    asm_kvm_coco,
    asm_kvm_xen,
    capabilities,
    exit_codes,
    kvm_run,
    linux_kvm,
    request,
    requests,
)
from kvm_ioctl.cstruct import CStruct
from kvm_ioctl.request import Ioctl

RECORD = Path(__file__).with_name("abi.json")

_MODULES = (asm_kvm, asm_kvm_xen, asm_kvm_coco, linux_kvm, kvm_run, capabilities, exit_codes)
_COMPILE_TIMEOUT_S = 120

Facts = dict[str, int]
"""Values by C expression."""


class AbiError(Exception):
    """The headers cannot be asked: no such headers, no compiler, or it fails."""


# What the declarations claim


def declared() -> Facts:
    """Return every fact that the declarations of this package claim."""
    facts: Facts = {}
    for struct in structs():
        facts |= _struct_facts(struct)
    for table in request_tables():
        facts |= {ioctl.name: ioctl.number for ioctl in ioctls(table)}
    facts["KVMIO"] = request.KVMIO
    for module in _MODULES:
        facts |= _constants(module)
    return facts


def structs() -> Iterator[type[CStruct]]:
    """Yield every struct that is declared under a kernel name."""
    for module in _MODULES:
        for name, value in vars(module).items():
            is_struct = isinstance(value, type) and issubclass(value, CStruct)
            if is_struct and value.__module__ == module.__name__ and not name.startswith("_"):
                yield value


def request_tables() -> Iterator[type]:
    """Yield the classes that hold requests."""
    for value in vars(requests).values():
        if isinstance(value, type) and value.__module__ == requests.__name__:
            yield value


def ioctls(table: type) -> Iterator[Ioctl[Any, Any]]:
    """Yield the requests of one table."""
    return (value for value in vars(table).values() if isinstance(value, Ioctl))


def _constants(module: ModuleType) -> Facts:
    facts: Facts = {}
    for name, value in vars(module).items():
        if isinstance(value, type) and value.__module__ == module.__name__:
            if issubclass(value, IntEnum | IntFlag):
                facts |= {member: int(number) for member, number in value.__members__.items()}
        elif isinstance(value, int) and name.isupper() and not name.startswith("_"):
            facts[name] = value
    return facts


def _struct_facts(struct: type[CStruct]) -> Facts:
    name = struct.__name__
    facts = {f"sizeof(struct {name})": ctypes.sizeof(struct)}
    facts |= dict(_member_facts(name, struct, "", 0))
    if struct.flex is not None:
        facts[f"offsetof(struct {name}, {struct.flex.path})"] = ctypes.sizeof(struct)
    return facts


def _member_facts(
    struct: str, kind: type[ctypes.Structure] | type[ctypes.Union], path: str, base: int
) -> Iterator[tuple[str, int]]:
    anonymous = getattr(kind, "_anonymous_", ())
    for name, ctype, *bits in getattr(kind, "_fields_", ()):
        offset = base + getattr(kind, name).offset
        if bits:
            member = f"bits(struct {struct}, {path}{name})"
            yield member, _bits(kind, name, bits[0], base)
        elif name in anonymous:
            yield from _member_facts(struct, ctype, path, offset)
        else:
            yield f"offsetof(struct {struct}, {path}{name})", offset
            if not _is_named(ctype):
                yield f"sizeof(((struct {struct} *)0)->{path}{name})", ctypes.sizeof(ctype)
            yield from _inner_facts(struct, ctype, path + name, offset)


def _inner_facts(struct: str, ctype: Any, path: str, offset: int) -> Iterator[tuple[str, int]]:
    """Go into members whose type has no name in the kernel: those begin with an underscore here."""
    if issubclass(ctype, ctypes.Array):
        ctype, path = ctype._type_, f"{path}[0]"
    if ctype.__name__.startswith("_kvm") and issubclass(ctype, ctypes.Structure | ctypes.Union):
        yield from _member_facts(struct, ctype, f"{path}.", offset)


def _is_named(ctype: Any) -> bool:
    """Tell whether the type is a struct whose size is a fact of its own."""
    return issubclass(ctype, CStruct) and not ctype.__name__.startswith("_")


def _bits(kind: Any, name: str, width: int, base: int) -> int:
    value = kind()
    setattr(value, name, (1 << width) - 1)
    where, mask = next((i, byte) for i, byte in enumerate(bytes(value)) if byte)
    return base + where << 8 | mask


# What the headers say


def include_dirs(headers: Path) -> list[Path]:
    """Return the directories to include from; raises AbiError if there is no linux/kvm.h."""
    for root in (headers, headers / "include", headers / "usr/include"):
        if (root / "linux/kvm.h").is_file():
            multiarch = root / "x86_64-linux-gnu"
            return [root, multiarch] if multiarch.is_dir() else [root]
    raise AbiError(f"no linux/kvm.h below {headers}")


def header_texts(headers: Path) -> dict[str, str]:
    """Return the text of linux/kvm.h and asm/kvm.h by name."""
    texts = {}
    for name in ("linux/kvm.h", "asm/kvm.h"):
        found = [path for root in include_dirs(headers) if (path := root / name).is_file()]
        if not found:
            raise AbiError(f"no {name} below {headers}")
        texts[name] = found[0].read_text()
    return texts


def kernel_version(headers: Path) -> tuple[int, ...]:
    """Return the version of the kernel that the headers are from (linux/version.h)."""
    try:
        text = (include_dirs(headers)[0] / "linux/version.h").read_text()
    except OSError as e:
        raise AbiError(f"the headers do not say their version: {e}") from e
    code = re.search(r"LINUX_VERSION_CODE\s+(\d+)", text)
    if code is None:
        raise AbiError(f"no LINUX_VERSION_CODE in linux/version.h below {headers}")
    number = int(code[1])
    return number >> 16, number >> 8 & 0xFF, number & 0xFF


_PROGRAM = """\
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <linux/kvm.h>
static unsigned long long first_bits(const unsigned char *bytes)
{
	unsigned long long i = 0;
	while (!bytes[i])
		i++;
	return i << 8 | bytes[i];
}
#define bits(type, member) __extension__ ({ \\
	type value; memset(&value, 0, sizeof(value)); value.member = -1; \\
	first_bits((const unsigned char *)&value); })
#define SAY(text, value) printf("%llu %s\\n", (unsigned long long)(value), text);
int main(void) {
"""


def seen(expressions: list[str], headers: Path, compiler: str = "cc") -> Facts:
    """Return the values of those expressions that the headers know."""
    first_line = _PROGRAM.count("\n") + 1
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "abi.c")
        known = expressions
        while True:
            lines = [f'SAY("{expression}", {expression})\n' for expression in known]
            source.write_text(_PROGRAM + "".join(lines) + "return 0; }\n")
            rejected = _rejected_lines(source, headers, compiler)
            if not rejected:
                return _run_program(source, headers, compiler)
            kept = [e for line, e in enumerate(known, first_line) if line not in rejected]
            if len(kept) == len(known):
                raise AbiError(f"{compiler} rejects the program for another reason than its facts")
            known = kept


def _compile(source: Path, headers: Path, compiler: str, *options: str) -> tuple[int, str]:
    includes = [arg for path in include_dirs(headers) for arg in ("-isystem", str(path))]
    command = [compiler, "-w", *includes, *options, str(source)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)
    except OSError as e:
        raise AbiError(f"cannot run the compiler {compiler}: {e.strerror}") from e
    except subprocess.TimeoutExpired as e:
        raise AbiError(f"{compiler} took more than {_COMPILE_TIMEOUT_S} s") from e
    return done.returncode, done.stderr


def _rejected_lines(source: Path, headers: Path, compiler: str) -> set[int]:
    status, messages = _compile(source, headers, compiler, "-fsyntax-only", "-fmax-errors=0")
    if status == 0:
        return set()
    lines = re.findall(rf"^{re.escape(str(source))}:(\d+):", messages, re.MULTILINE)
    if not lines:
        raise AbiError(f"{compiler} failed: {messages.strip().partition(chr(10))[0]}")
    return set(map(int, lines))


def _run_program(source: Path, headers: Path, compiler: str) -> Facts:
    program = source.with_suffix(".out")
    status, messages = _compile(source, headers, compiler, "-o", str(program))
    if status != 0:
        raise AbiError(f"{compiler} failed: {messages.strip().partition(chr(10))[0]}")
    output = subprocess.run(
        [program], capture_output=True, text=True, check=True, timeout=_COMPILE_TIMEOUT_S
    ).stdout
    pairs = (line.split(" ", 1) for line in output.splitlines())
    return {expression: int(value) for value, expression in pairs}


# The comparison


@dataclass(frozen=True)
class Comparison:
    """Declared facts against those of some headers."""

    kernel: tuple[int, ...]
    differing: list[str]
    unknown: list[str]
    """Facts that these headers, being older, say nothing about."""


def compare(claimed: Facts, headers: Path, compiler: str = "cc") -> Comparison:
    """Compare the claimed facts with the headers."""
    real = seen(list(claimed), headers, compiler)
    unknown = [expression for expression in claimed if expression not in real]
    grown = set(filter(None, map(_struct_of, unknown)))
    differing = [
        f"{expression} is {real[expression]}, declared {claimed[expression]}"
        for expression in real
        if real[expression] != claimed[expression] and not _may_have_grown(expression, grown)
    ]
    return Comparison(kernel_version(headers), differing, unknown)


def _struct_of(expression: str) -> str | None:
    found = re.search(r"struct (\w+)[ ,]", expression)
    return found[1] if found else None


def _may_have_grown(expression: str, grown: set[str]) -> bool:
    """Tell whether a newer field explains it: the struct's size, or the padding it was cut from."""
    if match := re.fullmatch(r"sizeof\(struct (\w+)\)", expression):
        return match[1] in grown
    member = re.search(r"\b(pad|padding|reserved)\w*\)?$", expression)
    return member is not None and _struct_of(expression) in grown


@dataclass(frozen=True)
class Record:
    """The facts of one kernel's headers, as kept in ``abi.json``."""

    kernel: tuple[int, ...]
    facts: Facts

    @classmethod
    def load(cls) -> Record:
        """Read ``abi.json``."""
        data = json.loads(RECORD.read_text())
        return cls(tuple(map(int, data["kernel"].split("."))), data["facts"])

    def save(self) -> None:
        """Write ``abi.json``."""
        data = {"kernel": ".".join(map(str, self.kernel)), "facts": self.facts}
        RECORD.write_text(json.dumps(data, indent=0) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Compare with headers, or record them; 0: agree, 1: differ, 2: could not be asked."""
    parser = argparse.ArgumentParser(prog="python -m kvm_ioctl.abi", description=main.__doc__)
    parser.add_argument("--headers", type=Path, default=Path("/usr/include"), metavar="DIR")
    parser.add_argument("--compiler", default="cc")
    parser.add_argument("--write", action="store_true", help="record these headers in abi.json")
    options = parser.parse_args(argv)
    try:
        return _check(options.headers, options.compiler, options.write)
    except AbiError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


def _check(headers: Path, compiler: str, write: bool) -> int:
    claimed = declared()
    comparison = compare(claimed, headers, compiler)
    kernel = ".".join(map(str, comparison.kernel))
    is_older = comparison.kernel < (Record.load().kernel if RECORD.exists() else (0,))
    missing = [] if is_older and not write else comparison.unknown
    for line in comparison.differing + [f"{expression} is not in them" for expression in missing]:
        print(f"{kernel}: {line}")
    if comparison.differing or missing:
        return 1
    if write:
        Record(comparison.kernel, claimed).save()
    unknown = f", {len(comparison.unknown)} are newer than they" if comparison.unknown else ""
    compared = len(claimed) - len(comparison.unknown)
    print(f"headers of {kernel}: {compared} facts agree{unknown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
