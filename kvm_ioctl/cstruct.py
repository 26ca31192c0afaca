"""Base classes for binary layouts shared with the kernel.

A layout is declared once, as plain ``ctypes`` fields in kernel order. Everything else (copying,
comparing, printing, flexible arrays, the check against the kernel's headers) is derived here.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Iterator, MutableSequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, cast, overload

if TYPE_CHECKING:
    from _ctypes import _PyCStructType as _StructMeta
    from _ctypes import _UnionType as _UnionMeta
else:
    _StructMeta = type(ctypes.Structure)
    _UnionMeta = type(ctypes.Union)

u8 = ctypes.c_uint8
u16 = ctypes.c_uint16
u32 = ctypes.c_uint32
u64 = ctypes.c_uint64
s8 = ctypes.c_int8
s16 = ctypes.c_int16
s32 = ctypes.c_int32
s64 = ctypes.c_int64
char = ctypes.c_char
void_p = ctypes.c_void_p

T = TypeVar("T")

_SHOWN_BYTES = 16
_SHOWN_ENTRIES = 16
"""Arrays longer than these are summarized when a struct is printed."""


class _StructType(_StructMeta):
    """Gives instances their fields and nothing else.

    ctypes itself lets ``regs.rpi = 1`` pass and loses the value; with empty slots it raises.
    """

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> _StructType:
        namespace.setdefault("__slots__", ())
        return super().__new__(mcs, name, bases, namespace)


class _UnionType(_UnionMeta):
    """The same for unions."""

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> _UnionType:
        namespace.setdefault("__slots__", ())
        return super().__new__(mcs, name, bases, namespace)


class Tail:
    """How long the flexible array at the end of a struct is, and where that is written down."""

    def __init__(self, entry: Any, count: str | None, size: str | None, path: str) -> None:
        self.entry = entry
        self.count = count
        self.size = size
        self.path = path

    def length(self, struct: CStruct) -> int:
        """Return the entries that are both claimed by the struct's header and allocated."""
        allocated = self.capacity(struct)
        if self.count is not None:
            return min(int(_resolve(struct, self.count)), allocated)
        if self.size is not None:
            tail_bytes = max(int(_resolve(struct, self.size)) - ctypes.sizeof(struct), 0)
            return min(tail_bytes // ctypes.sizeof(self.entry), allocated)
        return allocated

    def capacity(self, struct: CStruct) -> int:
        """Return the number of entries there is memory for."""
        tail_bytes = struct.allocated_bytes - ctypes.sizeof(struct)
        return tail_bytes // ctypes.sizeof(self.entry)

    def claim(self, struct: CStruct, entries: int) -> None:
        """Write the struct's count or size field for so many entries."""
        if self.count is not None:
            _assign(struct, self.count, entries)
        elif self.size is not None:
            nbytes = ctypes.sizeof(struct) + entries * ctypes.sizeof(self.entry)
            _assign(struct, self.size, nbytes)

    def view(self, struct: CStruct) -> ctypes.Array[Any]:
        """Return the valid entries as a view of the struct's own memory."""
        array: ctypes.Array[Any] = (self.entry * self.length(struct)).from_address(
            ctypes.addressof(struct) + ctypes.sizeof(struct)
        )
        # from_address() does not keep its memory alive.
        array._owner = struct  # type: ignore[attr-defined]
        return array


class FlexArray(Generic[T]):
    """Declares the flexible array member that ends a struct; reads as an array of its entries.

    ``count`` names the field that holds the number of entries, ``size`` the one that holds the
    bytes of the whole struct; without either, the allocation alone says how long the array is.
    A dotted name reaches into an embedded struct. ``path`` is the C name of the member where it
    differs from the attribute's.
    """

    def __init__(
        self, entry: type[T], *, count: str | None = None, size: str | None = None, path: str = ""
    ) -> None:
        self.tail = Tail(entry, count, size, path)

    def __set_name__(self, owner: type[CStruct], name: str) -> None:
        """Become the struct's tail, under the attribute's name."""
        self.tail.path = self.tail.path or name
        owner.flex = self.tail

    @overload
    def __get__(self, struct: None, owner: type) -> Self: ...
    @overload
    def __get__(self, struct: CStruct, owner: type) -> MutableSequence[T]: ...
    def __get__(self, struct: CStruct | None, owner: type) -> Self | MutableSequence[T]:
        """Return the valid entries, as a view of the struct's own memory."""
        if struct is None:
            return self
        return cast("MutableSequence[T]", self.tail.view(struct))


class FlexInts(FlexArray[int]):
    """A flexible array of integers."""

    def __init__(
        self,
        entry: type[ctypes._SimpleCData[int]],
        *,
        count: str | None = None,
        size: str | None = None,
        path: str = "",
    ) -> None:
        self.tail = Tail(entry, count, size, path)


class CStruct(ctypes.Structure, metaclass=_StructType):
    """A struct of the kernel's user interface, named as in the kernel."""

    __slots__ = ("_buffer",)

    header: ClassVar[str] = ""
    """The kernel header that declares it, as in ``#include <...>``."""

    flex: ClassVar[Tail | None] = None
    """The flexible array at its end, if it has one."""

    @classmethod
    def with_tail(cls, entries: int) -> Self:
        """Allocate the struct with a zeroed tail of so many entries and fill its count or size."""
        flex = cls._flex()
        struct = cls.over(bytearray(ctypes.sizeof(cls) + entries * ctypes.sizeof(flex.entry)))
        flex.claim(struct, entries)
        return struct

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Self:
        """Make a struct with these bytes; what exceeds the struct is its tail.

        Raises ValueError when the data is too short, or too long for a struct without a tail.
        """
        if len(data) < ctypes.sizeof(cls) or (len(data) > ctypes.sizeof(cls) and not cls.flex):
            raise ValueError(f"{cls.__name__} has {ctypes.sizeof(cls)} bytes, got {len(data)}")
        return cls.over(bytearray(data))

    @classmethod
    def over(cls, buffer: bytearray | mmap.mmap) -> Self:
        """Lay the struct over the start of this memory, and keep that alive."""
        struct: Self = cls.from_buffer(buffer)
        struct._buffer = buffer
        return struct

    @classmethod
    def _flex(cls) -> Tail:
        if cls.flex is None:
            raise TypeError(f"{cls.__name__} has no flexible array")
        return cls.flex

    @property
    def allocated_bytes(self) -> int:
        """Bytes of memory behind this struct, tail included."""
        buffer = getattr(self, "_buffer", None)
        return len(buffer) if self.flex is not None and buffer is not None else ctypes.sizeof(self)

    @property
    def tail(self) -> ctypes.Array[Any]:
        """The valid entries of the flexible array."""
        return self._flex().view(self)

    def as_bytes(self) -> bytes:
        """Return the struct and the valid entries of its tail."""
        nbytes = ctypes.sizeof(self)
        if self.flex is not None:
            nbytes += self.flex.length(self) * ctypes.sizeof(self.flex.entry)
        return ctypes.string_at(ctypes.addressof(self), nbytes)

    def copy(self) -> Self:
        """Return an independent struct with the same bytes and the same allocation."""
        return self.from_bytes(ctypes.string_at(ctypes.addressof(self), self.allocated_bytes))

    def clear(self) -> None:
        """Zero the struct and its tail; the count or size field is back to what is allocated."""
        ctypes.memset(ctypes.addressof(self), 0, self.allocated_bytes)
        if self.flex is not None:
            self.flex.claim(self, self.flex.capacity(self))

    def same_as(self, other: CStruct) -> bool:
        """Tell whether the other is the same kind of struct with the same valid bytes."""
        return type(self) is type(other) and self.as_bytes() == other.as_bytes()

    def fields_dict(self) -> dict[str, Any]:
        """Return the fields by name: ints, bytes, lists and nested dicts.

        Members of a union are all listed, each being a view of the same bytes.
        """
        return _plain_struct(self)

    def first_difference(self, other: Self) -> tuple[str, Any, Any] | None:
        """Return the path of the first field that differs and both its values."""
        return _difference("", self.fields_dict(), other.fields_dict())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({_shown_fields(self.fields_dict())})"


class CUnion(ctypes.Union, metaclass=_UnionType):
    """A union inside a struct of the kernel's user interface."""

    __slots__ = ()


def packed_format(kind: type[ctypes.Structure]) -> struct.Struct:
    """Return how the ``struct`` module reads and writes a struct that has integer fields only.

    That is one call for all fields; ctypes takes one for each, which counts where it is done for
    every exit or MSR. Raises TypeError if there is another field.
    """
    codes = []
    for field in kind._fields_:
        if not issubclass(field[1], ctypes._SimpleCData):
            raise TypeError(f"{kind.__name__}.{field[0]} is no integer")
        codes.append(field[1]._type_)  # type: ignore[attr-defined]
    # Both modules call C's types by the same letters, and both align them as the compiler does.
    return struct.Struct("@" + "".join(codes))


def _resolve(struct: Any, path: str) -> Any:
    for name in path.split("."):
        struct = getattr(struct, name)
    return struct


def _assign(struct: Any, path: str, value: int) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        struct = getattr(struct, parent)
    setattr(struct, name, value)


def field_names(kind: type[ctypes.Structure] | type[ctypes.Union]) -> Iterator[str]:
    """Yield the names of all declared fields, those of base classes first."""
    for base in reversed(kind.__mro__):
        for field in base.__dict__.get("_fields_", ()):
            yield field[0]


def _plain_struct(struct: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    anonymous = getattr(type(struct), "_anonymous_", ())
    for name in field_names(type(struct)):
        value = _plain(getattr(struct, name))
        if name in anonymous:
            plain.update(value)
        else:
            plain[name] = value
    flex = getattr(type(struct), "flex", None)
    if flex is not None:
        plain[flex.path.rpartition(".")[2]] = _plain(struct.tail)
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, ctypes.Structure | ctypes.Union):
        return _plain_struct(value)
    if isinstance(value, ctypes.Array):
        if value._type_ in (u8, char):
            return bytes(value)
        return [_plain(entry) for entry in value]
    return 0 if value is None else value  # a null void_p reads as None


def _difference(path: str, mine: Any, theirs: Any) -> tuple[str, Any, Any] | None:
    if mine == theirs:
        return None
    if isinstance(mine, dict) and isinstance(theirs, dict):
        pairs = [(f"{path}.{key}".lstrip("."), mine[key], theirs.get(key)) for key in mine]
    elif isinstance(mine, list | bytes) and type(mine) is type(theirs):
        if len(mine) != len(theirs):
            return (f"len({path})", len(mine), len(theirs))
        pairs = [(f"{path}[{i:#x}]", mine[i], theirs[i]) for i in range(len(mine))]
    else:
        return (path, mine, theirs)
    return next(found for pair in pairs if (found := _difference(*pair)) is not None)


def _shown_fields(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name}={_shown(value)}" for name, value in fields.items() if _is_set(value))


def _is_set(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_is_set, value.values()))
    if isinstance(value, bytes):
        return any(value)
    if isinstance(value, list):
        return any(map(_is_set, value))
    return bool(value)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{_shown_fields(value)}}}"
    if isinstance(value, bytes):
        used = len(value) - value.count(0)
        shown = f"<{len(value)} bytes, {used} not zero>"
        return value.hex() if len(value) <= _SHOWN_BYTES else shown
    if isinstance(value, list):
        used = sum(map(_is_set, value))
        shown = f"[{', '.join(map(_shown, value))}]"
        return shown if len(value) <= _SHOWN_ENTRIES else f"<{len(value)} entries, {used} not zero>"
    return hex(value) if isinstance(value, int) else repr(value)
