"""The table of fields: how many values of each are taken, by whom, and what departs from what."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from harness.errors import NsvmError
from harness.fields.rows import ENTERED, TAKEN, Row
from harness.fields.values import ALL_FIELDS

TEMPLATE: Final = "template"
"""The name of the field whose only cell is the template itself."""


class UnknownField(NsvmError):
    """The VMCB has no such field."""


def fields_named(names: Sequence[str]) -> list[str]:
    """Return the fields that are meant: `save.cr0`, `cr0`, `save.cs`, `control`; none: all.

    Raises UnknownField: one means nothing.
    """
    if not names:
        return [TEMPLATE, *ALL_FIELDS]
    wanted: dict[str, None] = {}
    for name in names:
        found = [field for field in (TEMPLATE, *ALL_FIELDS) if _means(name, field)]
        if not found:
            raise UnknownField(f"the VMCB has no field {name}: try save.cr0, save.cs or control")
        wanted.update(dict.fromkeys(found))
    return list(wanted)


def _means(name: str, field: str) -> bool:
    places = (field, field.removeprefix("control."), field.removeprefix("save."))
    return any(place == name or place.startswith(f"{name}.") for place in places)


@dataclass(frozen=True)
class Line:
    """All values of one field."""

    field: str
    values: int
    entered: int
    refused: int
    stopped: int
    """Nothing came back to L1."""
    taken: int
    """By KVM_SET_NESTED_STATE."""
    manual_refuses: int
    departing: int
    """From the manual."""
    differing: int
    """From the model."""


def lines(rows: Iterable[Row]) -> list[Line]:
    """Return one line for each field, in the rows' order."""
    by_field: dict[str, list[Row]] = {}
    for row in rows:
        by_field.setdefault(row.field, []).append(row)
    return [_line(field, of_it) for field, of_it in by_field.items()]


def _line(field: str, rows: Sequence[Row]) -> Line:
    entered = sum(row.vmrun == ENTERED for row in rows)
    refused = sum(row.refused for row in rows)
    return Line(
        field,
        len(rows),
        entered,
        refused,
        len(rows) - entered - refused,
        sum(row.set_state == TAKEN for row in rows),
        sum(bool(row.predicted.apm) for row in rows),
        sum(row.from_the_manual() is not None for row in rows),
        sum(bool(row.differences()) for row in rows),
    )


@dataclass(frozen=True)
class Departure:
    """Values of one field that depart from the manual in the same way."""

    field: str
    how: str
    values: tuple[str, ...]


def departures(rows: Iterable[Row]) -> list[Departure]:
    """Return where the kernel, with its CPU, departs from the manual; see `from_the_manual`."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        how = row.from_the_manual()
        if how is not None:
            found.setdefault((row.field, how), []).append(row.value)
    return [Departure(field, how, shortened(values)) for (field, how), values in found.items()]


def shortened(values: Sequence[str]) -> tuple[str, ...]:
    """Return values with runs of bits as `bits 3-7`."""
    found: list[str] = []
    run: list[int] = []
    for value in (*values, ""):
        bit = re.fullmatch(r"bit (\d+)", value)
        if bit and run and int(bit[1]) == run[-1] + 1:
            run.append(int(bit[1]))
            continue
        if run:
            found.append(f"bit {run[0]}" if len(run) == 1 else f"bits {run[0]}-{run[-1]}")
        run = [int(bit[1])] if bit else []
        if value and not bit:
            found.append(value)
    return tuple(found)
