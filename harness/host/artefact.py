"""The harness as one file that a lab machine's Python runs: what it carries, and the uploader.

Unlike the emulated host's bundle (`bundle.py`) it holds sources, for any Python from 3.11 on, and
beside them byte code of this Python, which another one passes over.
"""

from __future__ import annotations

import py_compile
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import guest_images
from harness.host.bundle import Bundle, carried_sources, content_name, tree_root
from harness.host.cache import build_file, cache_dir

#: What runs on a lab machine beside what runs in every host.
MORE = (
    "harness/host/agent.py",
    "harness/host/inventory.py",
    "harness/host/keeper.py",
    "harness/host/kvm_parameters.py",
    "harness/host/machine_lock.py",
)

_MAIN = """\
import runpy
import sys

if sys.version_info < (3, 11):
    sys.exit("Python 3.11 or newer, please; this is " + sys.version.split()[0])
verb = sys.argv[1]
if verb == "agent":
    runpy.run_module("harness.host.agent", run_name="__main__")
elif verb == "sweep":
    from harness.inside import remove_leftovers

    remove_leftovers()
else:
    from harness.host.keeper import main

    main()
"""

#: Run there with `python -c`: takes the artefact from its standard input. Old Pythons, too.
RECEIVER = """\
import hashlib, os, sys
directory, name, digest = sys.argv[1:4]
os.umask(0o077)
code = os.path.join(directory, "code")
os.makedirs(code, exist_ok=True)
target = os.path.join(code, name)
if sys.argv[4:] == ["ask"]:
    print("there" if os.path.exists(target) else "wanted")
    sys.exit(0)
data = sys.stdin.buffer.read()
if hashlib.sha256(data).hexdigest() != digest:
    sys.exit("the artefact arrived damaged")
temporary = "%s.%d" % (target, os.getpid())
with open(temporary, "wb") as out:
    out.write(data)
os.rename(temporary, target)
print("there")
"""

#: Run there with `python -c`, in place of the artefact's own `attach`: after a boot, a machine
#: without a disk of its own has no artefact, and must say that it was booted.
ATTACHER = """\
import json, os, runpy, sys
sys.argv = sys.argv[1:]
if os.path.exists(sys.argv[0]):
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    boot_id = open("/proc/sys/kernel/random/boot_id").read().strip()
    print(json.dumps({"gone": True, "boot_id": boot_id}))
"""


def build_artefact() -> Bundle:
    """Return the artefact for this tree, built if there is none for its content yet.

    Raises:
        HostError: the cache cannot be written, or a guest image cannot be built.
    """
    root = tree_root()
    sources = sorted({*carried_sources(root), *map(Path, MORE)})
    images = guest_images.build_all()
    name = content_name(_MAIN + sys.version, sources, images)

    def write(archive: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="nsvm-artefact-") as scratch:
            tree = Path(scratch)
            for source in sources:
                _add(root / source, tree / source, source)
            for image_name, image in images.items():
                _add(image, tree / "guest_images" / image_name, Path(image_name))
            (tree / "__main__.py").write_text(_MAIN)
            _pack(tree, archive)

    return Bundle(name, build_file(cache_dir() / "artefacts" / f"{name}.pyz", write))


def _add(source: Path, target: Path, shown_as: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    if target.suffix == ".py":
        py_compile.compile(
            str(target),
            str(target.with_suffix(".pyc")),
            dfile=str(shown_as),
            doraise=True,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )


def _pack(tree: Path, archive: Path) -> None:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        for path in sorted(p for p in tree.rglob("*") if p.is_file()):
            info = zipfile.ZipInfo(str(path.relative_to(tree)))
            out.writestr(info, path.read_bytes(), zipfile.ZIP_DEFLATED)
