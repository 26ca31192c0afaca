"""Tiny forged inputs: kernel images, modules, and a Debian archive in a directory."""

import hashlib
import shutil
import struct
import subprocess
from pathlib import Path

from harness.host.apt_sources import Mirror, Mirrors

RELEASE = "6.1.0-9-amd64"
UNAME_V = "#1 SMP PREEMPT_DYNAMIC Debian 6.1.9-1 (2026-01-01)"

needs_apt = not (shutil.which("apt-get") and shutil.which("dpkg-deb"))


def elf(*, sections=(), notes=(), tail=b"", machine=62):
    """An ELF64 with the given sections (name, bytes), PT_NOTE notes (name, type), and a tail."""
    note_data = b"".join(
        struct.pack("<III", len(name), 0, kind) + name + bytes(-len(name) % 4)
        for name, kind in notes
    )
    named = [(b"", b""), *sections, (b".shstrtab", b"")]
    strings = b"".join(name + b"\0" for name, _ in named)
    named[-1] = (b".shstrtab", strings)
    body = note_data
    headers = b""
    for index, (_, data) in enumerate(named):
        name_at = sum(len(n) + 1 for n, _ in named[:index])
        place = 120 + len(body)
        headers += struct.pack("<IIQQQQIIQQ", name_at, 1, 0, 0, place, len(data), 0, 0, 1, 0)
        body += data
    shoff = 120 + len(body)
    ident = b"\x7fELF\2\1\1" + bytes(9)
    ehdr = ident + struct.pack(
        "<HHIQQQIHHHHHH", 2, machine, 1, 0, 64, shoff, 0, 64, 56, 1, 64, len(named), len(named) - 1
    )
    phdr = struct.pack("<IIQQQQQQ", 4, 4, 120, 0, 0, len(note_data), len(note_data), 4)
    return ehdr + phdr + body + headers + tail


def vmlinux(release=RELEASE, *, pvh=True):
    banner = f"Linux version {release} (someone@example.org) (gcc 12) {UNAME_V}\n".encode()
    notes = [(b"Linux\0", 6), (b"Xen\0", 18)] if pvh else [(b"Xen\0", 6)]
    # A format string of the same shape stands before the banner in real kernels.
    return elf(notes=notes, tail=b"Linux version %s (%s)\0" + banner + b"\0")


def bzimage(payload, release=RELEASE, *, protocol=0x020F, loadflags=1, setup_sects=4):
    """A bzImage around an already compressed payload."""
    setup = bytearray((setup_sects + 1) * 512)
    version = f"{release} (someone@example.org) {UNAME_V}".encode() + b"\0"
    setup[0x1F1] = setup_sects
    setup[0x1FE:0x200] = b"\x55\xaa"
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, protocol)
    struct.pack_into("<H", setup, 0x20E, 0x400 - 0x200)
    setup[0x211] = loadflags
    struct.pack_into("<II", setup, 0x248, 64, len(payload))
    setup[0x400 : 0x400 + len(version)] = version
    return bytes(setup) + b"\x90" * 64 + payload + b"the end of the image"


def module(name, depends=(), release=RELEASE):
    """A module's ELF image with a .modinfo section as the kernel's build makes it."""
    strings = [
        "license=GPL",
        f"depends={','.join(depends)}",
        f"name={name}",
        f"vermagic={release} SMP mod_unload ",
    ]
    modinfo = b"".join(s.encode() + b"\0" for s in strings)
    return elf(sections=[(b".text", b"\xc3"), (b".modinfo", modinfo)])


def modules_tree(tree, modules, builtin=(), release=RELEASE):
    """Lay modules (name: dependencies) below tree/kernel, and modules.builtin."""
    where = tree / "kernel" / "drivers"
    where.mkdir(parents=True)
    for name, depends in modules.items():
        (where / f"{name}.ko").write_bytes(module(name.replace("-", "_"), depends, release))
    lines = [f"kernel/drivers/{name}.ko\n" for name in builtin]
    (tree / "modules.builtin").write_text("".join(lines))
    return tree


class ForgedArchive:
    """A Debian archive in a directory: unsigned, so its mirrors are trusted ones."""

    def __init__(self, root):
        self.root = Path(root)
        self._stanzas = {}

    @property
    def mirrors(self):
        mirror = Mirror(f"file:{self.root}", trusted=True)
        return Mirrors(mirror, mirror)

    def add(self, suite, name, version="1", files=(), padding=0):
        """Build a package of `files` (path, bytes) and list it in `suite`."""
        tree = self.root / "build" / f"{name}-{suite}-{len(self._stanzas.get(suite, []))}"
        for path, data in files:
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_bytes(data)
        control = (
            f"Package: {name}\nVersion: {version}\nArchitecture: amd64\n"
            "Maintainer: Nobody <nobody@example.org>\nDescription: forged\n"
        )
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "DEBIAN/control").write_text(control)
        if padding:
            (tree / "DEBIAN/padding").write_bytes(bytes(padding))
        pool = self.root / "pool"
        pool.mkdir(exist_ok=True)
        deb = pool / f"{name}_{version.replace(':', '%3a')}_amd64.deb"
        subprocess.run(
            ["dpkg-deb", "-Znone", "--root-owner-group", "-b", tree, deb],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip
        data = deb.read_bytes()
        self._stanzas.setdefault(suite, []).append(
            f"{control}Filename: pool/{deb.name}\nSize: {len(data)}\n"
            f"SHA256: {hashlib.sha256(data).hexdigest()}\n\n"
        )
        self._write_suite(suite)
        return deb

    def add_kernel(self, suite, release, version, modules=("kvm",)):
        """Add a kernel in one package, laid out as Debian does up to 6.18."""
        image = bzimage(vmlinux(release), release)
        files = [(f"boot/vmlinuz-{release}", image)]
        for name in modules:
            path = f"lib/modules/{release}/kernel/{name}.ko"
            files.append((path, module(name, release=release)))
        files.append((f"lib/modules/{release}/modules.builtin", b"kernel/virtio.ko\n"))
        return self.add(suite, f"linux-image-{release}", version, files, padding=200_000)

    def _write_suite(self, suite):
        listing = "".join(self._stanzas[suite]).encode()
        where = self.root / "dists" / suite
        (where / "main/binary-amd64").mkdir(parents=True, exist_ok=True)
        (where / "main/binary-amd64/Packages").write_bytes(listing)
        (where / "Release").write_text(
            f"Origin: Forged\nSuite: {suite}\nCodename: {suite}\nArchitectures: amd64\n"
            "Components: main\nDate: Thu, 01 Jan 2026 00:00:00 UTC\nSHA256:\n"
            f" {hashlib.sha256(listing).hexdigest()} {len(listing)} main/binary-amd64/Packages\n"
        )
