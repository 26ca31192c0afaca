"""Small ELF files made by hand, so that loader tests need no compiler."""

import struct

EM = {32: 3, 64: 62}


def forge_elf(bits=64, segments=((0x100000, b"code", 4),), entry=0x100000, symbols=(), **header):
    """Return an ELF executable: headers, program headers, segments, symbol table, its names."""
    wide = bits == 64
    ehsize, phsize, shsize = (64, 56, 64) if wide else (52, 32, 40)
    body = bytearray()
    start = ehsize + phsize * len(segments)
    phdrs = b""
    for gpa, data, size in segments:
        offset = start + len(body)
        body += data
        if wide:
            phdrs += struct.pack("<IIQQQQQQ", 1, 7, offset, gpa, gpa, len(data), size, 4096)
        else:
            phdrs += struct.pack("<IIIIIIII", 1, offset, gpa, gpa, len(data), size, 7, 4096)
    names, table = b"\0", bytes(24 if wide else 16)
    for name, value in symbols:
        at = len(names)
        names += name.encode() + b"\0"
        table += (
            struct.pack("<IBBHQQ", at, 0, 0, 1, value, 0)
            if wide
            else struct.pack("<IIIBBH", at, value, 0, 0, 0, 1)
        )
    table_at = start + len(body)
    body += table
    names_at = start + len(body)
    body += names
    shoff = start + len(body)
    shdr = "<IIQQQQIIQQ" if wide else "<IIIIIIIIII"
    body += struct.pack(shdr, *[0] * 10)
    body += struct.pack(shdr, 0, 2, 0, 0, table_at, len(table), 2, 0, 8, 24 if wide else 16)
    body += struct.pack(shdr, 0, 3, 0, 0, names_at, len(names), 0, 0, 1, 0)
    ident = b"\x7fELF" + bytes([header.get("elf_class", 2 if wide else 1), 1, 1]) + bytes(9)
    ehdr = struct.pack(
        "<16sHHIQQQIHHHHHH" if wide else "<16sHHIIIIIHHHHHH",
        ident,
        header.get("type", 2),
        header.get("machine", EM[bits]),
        1,
        entry,
        ehsize,
        shoff,
        0,
        ehsize,
        phsize,
        len(segments),
        shsize,
        3,
        2,
    )
    return ehdr + phdrs + bytes(body)


def multiboot_header(flags=0):
    """Return a multiboot 1 header with a right checksum."""
    magic = 0x1BADB002
    return struct.pack("<III", magic, flags, -(magic + flags) & 0xFFFFFFFF)
