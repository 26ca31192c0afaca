"""Imports point one way. Names every module that goes against that."""

import ast
import sys
from pathlib import Path

import pytest

from harness.host.bundle import CARRIED, carried_sources, tree_root

ROOT = tree_root()
OURS = ("kvm_ioctl", "harness", "guest_images")

SVM = ("kvm_ioctl", "harness.svm")
MACHINE = (*SVM, "harness.errors", "harness.machine")
PROBE = (*MACHINE, "harness.model", "harness.probe")
PROXY = (*MACHINE, "harness.proxy")
MIGRATE = (*MACHINE, "harness.migrate")

#: Third-party, and in a host where QEMU is (`harness.host.qemu_payload`).
BESIDE_QEMU = ("qemu.qmp", "pexpect")

#: What each part may import of this project. Third-party packages are for none of these.
MAY_IMPORT = {
    "kvm_ioctl": ("kvm_ioctl",),
    "harness.svm": SVM,
    "harness.model": ("kvm_ioctl.asm_kvm", "harness.svm", "harness.model"),
    "harness.machine": MACHINE,
    "harness.probe": PROBE,
    "harness.proxy": PROXY,
    "harness.migrate": MIGRATE,
    "harness.identify": (*PROBE, "harness.proxy", "harness.facts", "harness.identify"),
    "harness.crosscheck": (*PROBE, "harness.proxy", "harness.crosscheck"),
    "harness.fields": (
        *PROXY,
        "harness.model",
        "harness.crosscheck",
        "harness.fields",
    ),
    "harness.nest": (
        *PROBE,
        "harness.proxy",
        "harness.migrate",
        "harness.storm",
        "harness.host.session",
        "harness.qemu_vmm",
        "harness.nest",
    ),
    "harness.qemu_vmm": (
        *MACHINE,
        "harness.migrate",
        "harness.host.monitor",
        "harness.host.session",
        "harness.qemu_vmm",
        *BESIDE_QEMU,
    ),
    "harness.tamper": (*PROBE, "harness.crosscheck", "harness.facts", "harness.tamper"),
    "harness.race": (*PROBE, "harness.proxy", "harness.facts", "harness.race"),
    "harness.storm": (*PROXY, "harness.migrate", "harness.storm"),
    "harness.scenarios": (
        *PROBE,
        "harness.proxy",
        "harness.migrate",
        "harness.storm",
        "harness.crosscheck",
        "harness.facts",
        "harness.fields",
        "harness.nest",
        "harness.qemu_vmm.errors",
        "harness.qemu_vmm.over",
        "harness.tamper",
        "harness.scenarios",
    ),
}

#: These know results and files, not VMs.
MAY_NOT_IMPORT = {
    part: ("harness.machine", "harness.probe", "harness.scenarios")
    for part in ("harness.host", "harness.network", "harness.report")
}


def is_in(module, parts):
    return any(module == part or module.startswith(f"{part}.") for part in parts)


def module_name(source):
    """kvm_ioctl/vm.py is kvm_ioctl.vm; a package's __init__.py is the package."""
    parts = source.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources_of(root):
    return [path.relative_to(root) for top in OURS for path in sorted((root / top).rglob("*.py"))]


def imports_of(root, source):
    """Yield every module that `source` imports, inside functions too, with the line."""
    for node in ast.walk(ast.parse((root / source).read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = absolute(source, node)
            for alias in node.names:
                # "from harness import facts" imports a module, "from harness.facts import svm" not.
                inner = f"{base}.{alias.name}"
                yield (inner if is_module(root, inner) else base), node.lineno


def absolute(source, node):
    if not node.level:
        return node.module
    package = source.parts[: -node.level]
    return ".".join([*package, *([node.module] if node.module else [])])


def is_module(root, name):
    path = root.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def is_ours(module):
    return is_in(module, OURS)


def is_stdlib(module):
    return module.partition(".")[0] in sys.stdlib_module_names


def offences(root, may_import=MAY_IMPORT, may_not_import=MAY_NOT_IMPORT):
    """Return a line for each import that goes against the tables."""
    found = []
    for source in sources_of(root):
        importer = module_name(source)
        allowed = next((may_import[part] for part in may_import if is_in(importer, [part])), None)
        denied = next((m for part, m in may_not_import.items() if is_in(importer, [part])), ())
        for imported, line in imports_of(root, source):
            if is_in(imported, denied) or not is_allowed(imported, allowed):
                found.append(f"{source}:{line} imports {imported}")
    return found


def is_allowed(imported, allowed):
    return allowed is None or is_stdlib(imported) or is_in(imported, allowed)


def not_carried(root, carried):
    """Return a line for each import, by a carried module, of what a host does not have."""
    modules = {module_name(source) for source in carried if source.suffix == ".py"}
    return [
        f"{source}:{line} imports {imported}"
        for source in carried
        if source.suffix == ".py"
        for imported, line in imports_of(root, source)
        if not is_stdlib(imported)
        and imported not in modules
        and not is_beside_qemu(source, imported)
    ]


def is_beside_qemu(source, imported):
    users = ("harness/qemu_vmm/", "harness/host/monitor.py")
    return str(source).startswith(users) and is_in(imported, BESIDE_QEMU)


def test_imports_point_one_way():
    found = offences(ROOT)
    assert not found, "\n".join(found)


def test_what_is_carried_into_a_host_needs_nothing_else():
    found = not_carried(ROOT, carried_sources(ROOT))
    assert not found, "\n".join(found)


def test_all_that_is_to_be_carried_is_there():
    assert [name for name in CARRIED if not (ROOT / name).exists()] == []


def test_the_tables_name_parts_that_exist():
    parts = [*MAY_IMPORT, *MAY_NOT_IMPORT, *(m for ms in MAY_IMPORT.values() for m in ms)]
    ours = [part for part in parts if part not in BESIDE_QEMU]
    assert [part for part in ours if not is_module(ROOT, part)] == []


# The walk itself, on trees in which something is wrong


@pytest.fixture
def tree(tmp_path):
    def make(**files):
        for name, text in files.items():
            path = tmp_path.joinpath(*name.split("__")).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("importer", "line", "imported"),
    [
        ("kvm_ioctl__vm", "import harness.errors", "harness.errors"),
        ("kvm_ioctl__vm", "import rich", "rich"),
        ("kvm_ioctl__vm", "def f():\n    from psutil import Process", "psutil"),
        ("harness__svm__vmcb", "from harness.machine.memory import Slot", "harness.machine.memory"),
        ("harness__svm__vmcb", "from harness.machine import memory", "harness.machine.memory"),
        ("harness__svm__vmcb", "from ..machine import memory", "harness.machine.memory"),
        ("harness__svm__vmcb", "from .. import facts", "harness.facts"),
        ("harness__model__state", "import kvm_ioctl.vm", "kvm_ioctl.vm"),
        ("harness__machine__machine", "from harness.model.state import S", "harness.model.state"),
        ("harness__probe__memcg", "import harness.facts", "harness.facts"),
        ("harness__scenarios__case", "import harness.host.local", "harness.host.local"),
        ("harness__scenarios__case", "import pytest", "pytest"),
        ("harness__host__local", "import harness.machine.memory", "harness.machine.memory"),
        ("harness__report__html", "from harness.probe import memcg", "harness.probe.memcg"),
    ],
)
def test_a_forbidden_import_is_named(tree, importer, line, imported):
    files = {
        "harness__facts": "",
        "harness__machine__memory": "",
        "harness__probe__memcg": "",
        importer: line,
    }
    [found] = offences(tree(**files))
    path, _, rest = found.partition(":")
    assert path == importer.replace("__", "/") + ".py"
    assert rest.endswith(f" imports {imported}")


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("kvm_ioctl__vm", "import os.path\nfrom kvm_ioctl.request import Fd\nfrom . import rings"),
        ("harness__model__state", "from harness.svm.vmcb import VMCB"),
        ("harness__probe__memcg", "from harness.machine import memory"),
        ("harness__scenarios__case", "from harness.facts import svm\nimport harness.model.state"),
        ("harness__host__local", "import psutil\nfrom harness.facts import svm"),
        ("harness__cli", "import rich\nimport harness.machine.memory"),
    ],
)
def test_an_allowed_import_is_not(tree, importer, line):
    assert offences(tree(**{"kvm_ioctl__rings": "", importer: line})) == []


def test_a_name_is_not_taken_for_a_longer_one():
    assert not is_in("harness.hosting", ["harness.host"])


@pytest.mark.parametrize("line", ["import rich", "import harness.host.local", "import harness.cli"])
def test_what_a_host_does_not_have_is_named(tree, line):
    root = tree(harness__inside=f"import json\nimport harness.facts\n{line}", harness__facts="")
    carried = [Path("harness/inside.py"), Path("harness/facts.py"), Path("kvm_ioctl/abi.json")]
    assert not_carried(root, carried) == [
        f"harness/inside.py:3 {line.replace('import', 'imports')}"
    ]
