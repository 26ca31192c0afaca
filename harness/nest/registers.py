"""Work for the FPU and the vector registers, in machine code: what is lost in them is noticed."""

from __future__ import annotations

import ctypes
import mmap
import struct
from pathlib import Path
from typing import Final

from harness.errors import ScenarioFailure

_PAGE: Final = 4096
_SPINS: Final = 200_000
"""For registers to be kept; some timer interrupts long."""
_TEN_BITS: Final = 0x3FF
_STEPS: Final = 500
_REPEATS: Final = 100
"""Of as many steps of arithmetic; together some timer interrupts long."""
_LANES: Final = 4

# Values go into the first and the last vector register and onto the x87 stack; after a loop of ESI
# iterations all come out again. rdi: in, rdx: out.
_KEEP_AVX: Final = bytes.fromhex(
    "c5fe6f07"  # vmovdqu ymm0, [rdi]
    "c57e6f7f20"  # vmovdqu ymm15, [rdi+32]
    "d9eb"  # fldpi
    "89f1 ffc9 75fc"  # mov ecx, esi; 1: dec ecx; jnz 1b
    "dd5a40"  # fstp qword [rdx+64]
    "c5fe7f02"  # vmovdqu [rdx], ymm0
    "c57e7f7a20"  # vmovdqu [rdx+32], ymm15
    "c5f877 c3"  # vzeroupper; ret
)
_KEEP_SSE: Final = bytes.fromhex(
    "f30f6f07"  # movdqu xmm0, [rdi]
    "f3440f6f7f20"  # movdqu xmm15, [rdi+32]
    "d9eb 89f1 ffc9 75fc dd5a40"
    "f30f7f02"  # movdqu [rdx], xmm0
    "f3440f7f7a20"  # movdqu [rdx+32], xmm15
    "c3"
)
_PI: Final = struct.pack("<Q", 0x4009_21FB_5444_2D18)

# ESI times x = x * a + b in every lane, and a count on the x87 stack. rdi: x, a, b; rdx: x, count.
_COUNT_SSE: Final = bytes.fromhex(
    "660f1007 660f104f20 660f105740"  # movupd xmm0, [rdi]; xmm1, [rdi+32]; xmm2, [rdi+64]
    "d9e8 d9ee 89f1"  # fld1; fldz; mov ecx, esi
    "660f59c1 660f58c2 d8c1"  # 1: mulpd xmm0, xmm1; addpd xmm0, xmm2; fadd st, st(1)
    "ffc9 75f2"  # dec ecx; jnz 1b
    "660f1102 dd5a20 ddd8 c3"  # movupd [rdx], xmm0; fstp qword [rdx+32]; fstp st; ret
)
_COUNT_AVX: Final = bytes.fromhex(
    "c5fd1007 c5fd104f20 c5fd105740"  # vmovupd ymm0, [rdi]; ymm1, [rdi+32]; ymm2, [rdi+64]
    "d9e8 d9ee 89f1"
    "c5fd59c1 c5fd58c2 d8c1"  # 1: vmulpd ymm0, ymm0, ymm1; vaddpd ymm0, ymm0, ymm2; fadd
    "ffc9 75f2"
    "c5fd1102 dd5a20 ddd8 c5f877 c3"
)


def keep_registers(number: int) -> str:
    """Keep values in registers while interrupts come; the text does not say which registers.

    Raises ScenarioFailure: one changed.
    """
    code = _KEEP_AVX if _has_avx() else _KEEP_SSE
    width = 32 if code is _KEEP_AVX else 16
    given = struct.pack("<16I", *((number + 1) * 0x9E37_79B1 * n & 0xFFFF_FFFF for n in range(16)))
    taken = _run(code, given, _SPINS + (number & _TEN_BITS), 72)
    for at in (0, 32):
        _require(taken[at : at + width] == given[at : at + width], "a vector register changed")
    _require(taken[64:72] == _PI, "the x87 stack changed")
    return "kept"


def reckon(number: int) -> str:
    """Do arithmetic in FPU and vector registers, compare it with Python's; return a result.

    Raises ScenarioFailure: it came out differently.
    """
    code = _COUNT_AVX if _has_avx() else _COUNT_SSE
    lanes = _LANES if code is _COUNT_AVX else _LANES // 2
    start = [float(number + lane) for lane in range(_LANES)]
    # Nothing that comes to rest: every step must show.
    factors = [1.0 + 1.0 / (1000 + number + lane) for lane in range(_LANES)]
    terms = [1.0 / (7 + lane) for lane in range(_LANES)]
    given = struct.pack(f"<{3 * _LANES}d", *start, *factors, *terms)
    wanted = [_reckoned(*lane) for lane in zip(start, factors, terms, strict=True)]
    for _ in range(_REPEATS):
        *found, count = struct.unpack(f"<{_LANES + 1}d", _run(code, given, _STEPS, 40))
        _require(found[:lanes] == wanted[:lanes], f"vector arithmetic gave {found}, not {wanted}")
        _require(count == _STEPS, f"the x87 FPU counted {count}, not {_STEPS}")
    return wanted[0].hex()


def _reckoned(x: float, factor: float, term: float) -> float:
    for _ in range(_STEPS):
        x = x * factor + term
    return x


def _run(code: bytes, given: bytes, count: int, size_bytes: int) -> bytes:
    """Run machine code with what it is given; return so many bytes of what it made."""
    taken = ctypes.create_string_buffer(size_bytes)
    with mmap.mmap(-1, _PAGE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(code)
        anchor = ctypes.c_char.from_buffer(page)
        kind = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_uint, ctypes.c_void_p)
        kind(ctypes.addressof(anchor))(given, count, taken)
        del anchor
    return taken.raw


def _has_avx() -> bool:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return "avx" in line.split()
    return False


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ScenarioFailure(what)
