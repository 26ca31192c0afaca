"""Builds the initrd of a host, emulated or a guest of one, and keeps it in the cache."""

from __future__ import annotations

import hashlib
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from harness.host import initrd
from harness.host.cache import build_file, cache_dir
from harness.host.kernels import Kernel, module_closure, read_module
from harness.host.userland import userland

#: What the initrd's own process 1 consists of, beside this module.
AGENT_FILES = ("agent.py", "init.py")
SOURCES = Path(__file__).parent

#: Where `init` finds the tree's code, if it is not sent to the agent.
CODE_NAME = "code.zip"


def build_initrd(
    kernel: Kernel,
    wanted: Iterable[str],
    params: Mapping[str, str],
    code: Path | None = None,
) -> Path:
    """Return the initrd for `kernel`, built if there is none with this content yet.

    Args:
        kernel: its modules are taken.
        wanted: names of modules; those they depend on come along.
        params: of kvm_amd.
        code: the tree's code (`bundle.build_bundle`), to be carried in the initrd itself.

    """
    options = " ".join(f"{name}={value}" for name, value in sorted(params.items()))
    names = tuple(wanted)
    agent_files = {name: (SOURCES / name).read_bytes() for name in AGENT_FILES}
    digest = hashlib.sha256(repr((kernel.key, options, names, code and code.name)).encode())
    digest.update(str(userland()).encode())
    digest.update(Path(initrd.__file__).read_bytes())
    for content in agent_files.values():
        digest.update(content)

    def write(path: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="nsvm-agent-") as scratch:
            tree = Path(scratch)
            for name, content in agent_files.items():
                (tree / name).write_bytes(content)
            initrd.compile_tree(userland(), tree, "/nsvm")
            found = [*initrd.entries(userland(), tree, _modules(kernel, names, options))]
            with open(path, "wb") as out:
                for piece in initrd.cpio([*found, *_code(code)]):
                    out.write(piece)

    return build_file(cache_dir() / "initrd" / f"{digest.hexdigest()[:16]}.cpio", write)


def _modules(kernel: Kernel, names: Iterable[str], options: str) -> list[initrd.Module]:
    return [
        initrd.Module(
            module.stem.split(".")[0].replace("-", "_"),
            read_module(module),
            options if module.name.startswith("kvm-amd.") else "",
        )
        for module in module_closure(kernel, names)
    ]


def _code(code: Path | None) -> Iterator[initrd.Entry]:
    if code is not None:
        yield initrd.Entry(f"nsvm/{CODE_NAME}", stat.S_IFREG | 0o644, code.read_bytes())
