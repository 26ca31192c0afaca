"""Streams made without a VM, taken apart, damaged, and sealed again with right checksums."""

import io
import json
import random
import struct
import zlib
from dataclasses import dataclass

from harness.migrate.memory_image import Batch
from harness.migrate.sections import pack_parts
from harness.migrate.shape import Shape, SlotShape
from harness.migrate.stream import DONE, MAGIC, VERSION, StreamWriter
from harness.migrate.vcpu_parts import VCPU_PARTS
from harness.migrate.vm_parts import VM_PARTS
from harness.svm.vmcb import VMCB_SIZE, vmcb
from kvm_ioctl.asm_kvm import (
    NestedStateFlags,
    kvm_cpuid_entry2,
    kvm_lapic_state,
    kvm_msr_entry,
    kvm_nested_state,
    kvm_sregs2,
)
from kvm_ioctl.linux_kvm import kvm_irqchip

PAGE = 4096
START = struct.Struct("<8sH6x")
HEADER = struct.Struct("<4sIQI")
SOURCE = {"architecture": "x86_64", "kernel": "6.1", "capabilities": {"KVM_CAP_XCRS": 1}}
SHAPE = Shape(
    (4 * PAGE, 2 * PAGE),
    (SlotShape(0, 0, 0, 0, 0), SlotShape(1, 0, 0x10000, 0, 1), SlotShape(0, 1, 0, 0, 0)),
    2,
    True,
)


def nested_in_l2(flags=0x103, vmcb_pa=0x3000):
    """The nested state of a vCPU that runs L2, with a VMCB that says something."""
    block = vmcb()
    block.control.intercepts[3] = 1
    block.control.asid = 1
    block.save.rip, block.save.efer, block.save.cs.selector = 0x1234, 0x1500, 8
    block.save.star = 0x77  # not of L1: whatever was there
    state = kvm_nested_state.with_tail(VMCB_SIZE)
    state.flags, state.format = NestedStateFlags(flags), 1
    state.hdr.svm.vmcb_pa = vmcb_pa
    state.data[:] = block.as_bytes()
    return state.as_bytes()


def vm_parts(irqchip=True):
    chips = {"pic_master": 0, "pic_slave": 1, "ioapic": 2} if irqchip else {}
    parts = {name: kvm_irqchip(chip_id=chip).as_bytes() for name, chip in chips.items()}
    return {**parts, "clock": bytes(VM_PARTS["clock"].size.least)}


def vcpu_parts(irqchip=True, **changes):
    parts = {name: bytes(part.size.least) for name, part in VCPU_PARTS.items()}
    parts["cpuid"] = bytes(kvm_cpuid_entry2(function=0x80000001, ecx=4))
    parts["msrs"] = bytes(kvm_msr_entry(index=0xC0000080, data=0x1500))
    parts["sregs"] = kvm_sregs2(efer=0x1500, cr0=0x80000011).as_bytes()
    parts["lapic"] = kvm_lapic_state().as_bytes()
    parts["nested"] = nested_in_l2()
    if not irqchip:
        del parts["lapic"]
    parts |= changes
    return {name: data for name, data in parts.items() if data is not None}


def stream(*, source=SOURCE, shape=SHAPE, vm=None, vcpus=None, sides=None, pages=True, prep=()):
    """A whole valid stream, unless arguments make it another one."""
    sink = io.BytesIO()
    writer = StreamWriter(sink)
    is_shape = isinstance(shape, Shape)
    writer.head({"source": source, "shape": shape.to_json() if is_shape else shape})
    irqchip = shape.irqchip if is_shape else True
    if pages:
        writer.pages(Batch(0, ((1, 2),)), [memoryview(bytes([7]) * 2 * PAGE)])
        writer.pages(Batch(1, ((0, 1),)), [memoryview(bytes([9]) * PAGE)])
        scattered = [memoryview(bytes([number]) * PAGE) for number in (3, 4)]
        writer.pages(Batch(0, ((0, 1), (2, 1))), scattered)
    writer.side("early", 1)
    for number, parts in prep:
        writer.prepare(number, pack_parts(parts))
    writer.vm(vm_parts(irqchip) if vm is None else vm)
    count = shape.vcpus if is_shape else 2
    for number, parts in enumerate([vcpu_parts(irqchip)] * count if vcpus is None else vcpus):
        writer.vcpu(number, parts)
    for name, data in ({"proxies": {"l1": [1, None, "x"]}} if sides is None else sides).items():
        writer.side(name, data)
    writer.done()
    return sink.getvalue()


@dataclass
class Raw:
    """A section without its header."""

    tag: bytes
    body: bytes


def take_apart(data):
    at, sections = START.size, []
    while at < len(data):
        tag, _, size, _ = HEADER.unpack_from(data, at)
        at += HEADER.size + 4
        sections.append(Raw(tag, data[at : at + size]))
        at += size
    return sections


def section_bytes(raw, number):
    header = HEADER.pack(raw.tag, number, len(raw.body), zlib.crc32(raw.body))
    return header + struct.pack("<I", zlib.crc32(header)) + raw.body


def seal(sections, *, recount=True):
    """Put sections together with right numbers, lengths and checksums."""
    out = [START.pack(MAGIC, VERSION)]
    for number, raw in enumerate(sections):
        counts = recount and raw.tag == DONE
        body = struct.pack("<Q", number) if counts else raw.body
        out.append(section_bytes(Raw(raw.tag, body), number))
    return b"".join(out)


_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_JSON = (None, [], {}, "", -1, 1 << 70, 1.5, True, [[]] * 3, {"a": {}}, "x" * 300)


class Mutator:
    """Damages a valid stream so that its checksums stay right; the same seed, the same damage."""

    def __init__(self, data, seed):
        self.sections = take_apart(data)
        self.random = random.Random(seed)

    def mutated(self):
        sections = [Raw(raw.tag, raw.body) for raw in self.sections]
        for _ in range(self.random.choice((1, 1, 1, 2, 4))):
            self.random.choice(self.KINDS)(self, sections)
        return seal(sections, recount=self.random.random() < 0.95)

    def _any(self, sections):
        return self.random.choice(sections)

    def _drop(self, sections):
        if len(sections) > 1:
            del sections[self.random.randrange(len(sections))]

    def _twice(self, sections):
        raw = self._any(sections)
        sections.insert(self.random.randrange(len(sections)), Raw(raw.tag, raw.body))

    def _swap(self, sections):
        i, j = (self.random.randrange(len(sections)) for _ in range(2))
        sections[i], sections[j] = sections[j], sections[i]

    def _retag(self, sections):
        self._any(sections).tag = self._any(sections).tag

    def _flip(self, sections):
        raw = self._any(sections)
        if raw.body:
            body = bytearray(raw.body)
            body[self.random.randrange(len(body))] ^= 1 << self.random.randrange(8)
            raw.body = bytes(body)

    def _extreme(self, sections):
        raw = self._any(sections)
        if len(raw.body) >= 4:
            at = self.random.randrange(len(raw.body) - 3)
            value = struct.pack("<I", self.random.choice(_EXTREMES))
            raw.body = raw.body[:at] + value + raw.body[at + 4 :]

    def _cut(self, sections):
        raw = self._any(sections)
        raw.body = raw.body[: self.random.randrange(len(raw.body) + 1)]

    def _longer(self, sections):
        raw = self._any(sections)
        raw.body += self.random.randbytes(self.random.choice((1, 4, 40, PAGE)))

    def _noise(self, sections):
        raw = self._any(sections)
        raw.body = self.random.randbytes(self.random.choice((0, 4, 24, len(raw.body))))

    def _state(self, sections):
        """Noise in the data of one part, of the right size."""
        raw = self._any([raw for raw in sections if raw.tag in (b"VMST", b"VCPU")] or sections)
        if len(raw.body) > 80:
            at = self.random.randrange(8, len(raw.body) - 64)
            raw.body = raw.body[:at] + self.random.randbytes(64) + raw.body[at + 64 :]

    def _header(self, sections):
        """Nonsense in one place of the JSON of the header."""
        raw = sections[0]
        try:
            tree = json.loads(raw.body)
        except ValueError:
            return
        if isinstance(tree, dict):
            raw.body = json.dumps(self._with_nonsense(tree)).encode()

    def _with_nonsense(self, tree):
        inner = tree
        while True:
            keys = list(inner) if isinstance(inner, dict) else range(len(inner))
            if not keys:
                return tree
            key = self.random.choice(keys)
            if isinstance(inner[key], dict | list) and inner[key] and self.random.random() < 0.9:
                inner = inner[key]
                continue
            inner[key] = self.random.choice((*_JSON, *_EXTREMES, 1 << 40, 4096))
            return tree

    KINDS = (
        *(_drop, _twice, _swap, _retag, _flip, _flip, _extreme, _extreme, _cut, _longer, _noise),
        *(_state, _state, _header, _header),
    )
