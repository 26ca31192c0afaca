"""Bit fields of a register, declared high-to-low as the manual prints them."""

from __future__ import annotations

from typing import Self, overload


class BitField:
    """One field of a `Bits` register; reads as an int on a value, as itself on the class."""

    def __init__(self, hi: int, lo: int) -> None:
        if not 0 <= lo <= hi:
            raise ValueError(f"bits({hi}, {lo}): the high bit comes first")
        self.hi = hi
        self.lo = lo
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> BitField: ...
    @overload
    def __get__(self, instance: int, owner: type) -> int: ...
    def __get__(self, instance: int | None, owner: type) -> BitField | int:
        return self if instance is None else self.extract(instance)

    @property
    def limit(self) -> int:
        """The largest value that the field holds."""
        return (1 << (self.hi - self.lo + 1)) - 1

    @property
    def mask(self) -> int:
        """The field's bits, in place."""
        return self.limit << self.lo

    def extract(self, register: int) -> int:
        """Return the field's value in `register`."""
        return register >> self.lo & self.limit

    def insert(self, register: int, value: int) -> int:
        """Return `register` with the field set to `value`.

        Raises ValueError: `value` does not fit.
        """
        if not 0 <= value <= self.limit:
            raise ValueError(f"{self.name}: {value:#x} does not fit bits {self.hi}:{self.lo}")
        return register & ~self.mask | value << self.lo

    def __repr__(self) -> str:
        return f"<{self.name} {self.hi}:{self.lo}>"


def bits(hi: int, lo: int | None = None) -> BitField:
    """Declare a field from bit `hi` down to `lo` (a single bit without `lo`)."""
    return BitField(hi, hi if lo is None else lo)


class Bits(int):
    """A register's value whose fields read as attributes; immutable, an `int` everywhere else."""

    @classmethod
    def fields(cls) -> dict[str, BitField]:
        """Return the declared fields by name, in the order of declaration."""
        found: dict[str, BitField] = {}
        for base in reversed(cls.__mro__):
            found.update((k, v) for k, v in vars(base).items() if isinstance(v, BitField))
        return found

    @classmethod
    def of(cls, **values: int) -> Self:
        """Build a value from fields; all others are 0."""
        return cls(0).replace(**values)

    def replace(self, **values: int) -> Self:
        """Return a copy with some fields changed.

        Raises ValueError: no such field, or a value that does not fit it.
        """
        fields = self.fields()
        register = int(self)
        for name, value in values.items():
            if name not in fields:
                raise ValueError(f"{type(self).__name__} has no field {name}")
            register = fields[name].insert(register, value)
        return type(self)(register)

    def __repr__(self) -> str:
        fields = self.fields()
        shown = [f"{name}={f.extract(self):#x}" for name, f in fields.items() if f.extract(self)]
        declared = 0
        for f in fields.values():
            declared |= f.mask
        if rest := int(self) & ~declared:
            shown.append(f"rest={rest:#x}")
        return f"{type(self).__name__}({', '.join(shown)})"

    __str__ = __repr__
