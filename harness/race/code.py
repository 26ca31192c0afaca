"""The loops at guest speed: machine code beside its text, and the page that they share.

An attempt: the loop copies a template into vmcb12 and publishes its number in `seq`; the writer
sees that, spins for `delay` and a little by chance, and writes the illegal value; VMRUN runs into
that or not. L2 says that it is `here` and waits, or #VMEXIT comes at once and the loop says that it
is `after`. Either makes the writer write the legal value back and say `done`; before that L2 does
not exit. So what #VMEXIT of such an L2 saves to vmcb12 is never overwritten: an illegal value that
is found there was loaded.

The loop then moves `delay` towards the point where the outcome turns: longer if VMRUN was refused
or loaded the new value, shorter if the write came too late. Nearly every attempt is near the gap
between two reads, if there is one.

The texts are assembled and compared with the bytes by a test; names in capitals are offsets in
`race_control`. Both functions follow the C calling convention with `race_control` in RDI.
"""

from __future__ import annotations

from typing import Final

from harness.svm.vmcb import VMCB_SIZE
from kvm_ioctl.cstruct import CStruct, u64

RECORD_SIZE: Final = 2 * VMCB_SIZE
"""Bytes per attempt: vmcb12 as it was after #VMEXIT, then a `race_record`."""


class race_control(CStruct):
    """What the loop, the writer and L2 tell each other."""

    _fields_ = (
        ("stop", u64),
        ("seq", u64),
        ("here", u64),
        ("after", u64),
        ("done", u64),
        ("delay", u64),
        ("used", u64),
        ("random", u64),
        ("place", u64),
        ("illegal", u64),
        ("legal", u64),
        ("vmcb", u64),
        ("templates", u64),
        ("records", u64),
        ("attempts", u64),
        ("probe_offset", u64),
        ("probe_mask", u64),
        ("seen", u64),
    )


class race_record(CStruct):
    """One attempt: its number, the writer's delay, what L2 saw, the attempt L2 last ran in."""

    _fields_ = (("seq", u64), ("used", u64), ("seen", u64), ("here", u64))


LOOP: Final = """
53                     push rbx
4154                   push r12
4157                   push r15
4889fb                 mov rbx, rdi
4c8b4b68               mov r9, [rbx + RECORDS]
4c8b5370               mov r10, [rbx + ATTEMPTS]
4c8b6308               mov r12, [rbx + SEQ]
                       again:
49ffc4                 inc r12
4589e7                 mov r15d, r12d
4183e701               and r15d, 1
41c1e70c               shl r15d, 12
4c037b60               add r15, [rbx + TEMPLATES]
4c89fe                 mov rsi, r15
488b7b58               mov rdi, [rbx + VMCB]
b900020000             mov ecx, 512
f348a5                 rep movsq
48c7838800000000000000 mov qword ptr [rbx + SEEN], 0
4c896308               mov [rbx + SEQ], r12
488b4358               mov rax, [rbx + VMCB]
0f01d8                 vmrun
488b7358               mov rsi, [rbx + VMCB]
4c89cf                 mov rdi, r9
b900020000             mov ecx, 512
f348a5                 rep movsq
4c8927                 mov [rdi], r12
488b8388000000         mov rax, [rbx + SEEN]
48894710               mov [rdi + 16], rax
488b4310               mov rax, [rbx + HERE]
48894718               mov [rdi + 24], rax
4c896318               mov [rbx + AFTER], r12
b9ffffff7f             mov ecx, 0x7fffffff
                       wait_done:
4c396320               cmp [rbx + DONE], r12
7406                   je told
ffc9                   dec ecx
75f6                   jnz wait_done
eb58                   jmp out
                       told:
488b4330               mov rax, [rbx + USED]
48894708               mov [rdi + 8], rax
0f01dc                 stgi
488b4328               mov rax, [rbx + DELAY]
4889c2                 mov rdx, rax
48c1ea05               shr rdx, 5
48ffc2                 inc rdx
4181797081000000       cmp dword ptr [r9 + 0x70], 0x81
751e                   jne longer
488b4b78               mov rcx, [rbx + PROBE_OFFSET]
4d8b0409               mov r8, [r9 + rcx]
4d33040f               xor r8, [r15 + rcx]
4c858380000000         test r8, [rbx + PROBE_MASK]
7509                   jnz longer
4829d0                 sub rax, rdx
7907                   jns keep
31c0                   xor eax, eax
eb03                   jmp keep
                       longer:
4801d0                 add rax, rdx
                       keep:
48894328               mov [rbx + DELAY], rax
4981c100200000         add r9, 8192
49ffca                 dec r10
0f8537ffffff           jnz again
                       out:
4c89d0                 mov rax, r10
415f                   pop r15
415c                   pop r12
5b                     pop rbx
c3                     ret
"""
"""Executes VMRUN `attempts` times; RAX is how many are left, which is 0 unless the writer stopped.

Of two templates, odd attempts use the second.
"""

WRITER: Final = """
53                     push rbx
4154                   push r12
4156                   push r14
4889fb                 mov rbx, rdi
4c8b7338               mov r14, [rbx + RANDOM]
                       next:
48833b00               cmp qword ptr [rbx + STOP], 0
0f8582000000           jne end
4c8b6308               mov r12, [rbx + SEQ]
4c3b6320               cmp r12, [rbx + DONE]
74ec                   je next
4c89f0                 mov rax, r14
48c1e00d               shl rax, 13
4931c6                 xor r14, rax
4c89f0                 mov rax, r14
48c1e807               shr rax, 7
4931c6                 xor r14, rax
4c89f0                 mov rax, r14
48c1e011               shl rax, 17
4931c6                 xor r14, rax
4c89f1                 mov rcx, r14
48c1e93c               shr rcx, 60
b801000000             mov eax, 1
d3e0                   shl eax, cl
ffc8                   dec eax
4c89f2                 mov rdx, r14
48c1ea14               shr rdx, 20
4821d0                 and rax, rdx
48034328               add rax, [rbx + DELAY]
48894330               mov [rbx + USED], rax
48ffc0                 inc rax
                       spin:
48ffc8                 dec rax
75fb                   jnz spin
488b5340               mov rdx, [rbx + PLACE]
488b4348               mov rax, [rbx + ILLEGAL]
488902                 mov [rdx], rax
b900000004             mov ecx, 0x4000000
                       wait_end:
4c396310               cmp [rbx + HERE], r12
740a                   je restore
4c396318               cmp [rbx + AFTER], r12
7404                   je restore
ffc9                   dec ecx
75f0                   jnz wait_end
                       restore:
488b4350               mov rax, [rbx + LEGAL]
488902                 mov [rdx], rax
4c896320               mov [rbx + DONE], r12
e974ffffff             jmp next
                       end:
4c897338               mov [rbx + RANDOM], r14
415e                   pop r14
415c                   pop r12
5b                     pop rbx
c3                     ret
"""
"""Rewrites vmcb12 once per attempt until `stop`; `place` is the word's address where it runs."""

L2: Final = """
48898388000000         mov [rbx + SEEN], rax
488b4308               mov rax, [rbx + SEQ]
48894310               mov [rbx + HERE], rax
b900000040             mov ecx, 0x40000000
                       wait_writer:
48394320               cmp [rbx + DONE], rax
7405                   je ready
ffc9                   dec ecx
75f6                   jnz wait_writer
f4                     hlt
                       ready:
0f01d9                 vmmcall
"""
"""Reports RAX as `seen`, waits for the writer and exits by VMMCALL; by HLT if that took too long.

VMRUN loads neither RBX nor most other registers: RBX is the loop's, the address of `race_control`.
"""


def machine_code(listing: str) -> bytes:
    """Return the bytes of a listing: its first column."""
    return b"".join(bytes.fromhex(line[:_TEXT_AT]) for line in listing.splitlines())


_TEXT_AT = 23


def assembly(listing: str) -> str:
    """Return the text of a listing: its second column."""
    return "\n".join(line[_TEXT_AT:] for line in listing.splitlines())
