"""What is called inside a host for `nsvm fields`: all cells of some fields."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Self

from harness.fields.predict import predict
from harness.fields.rows import STOPPED, Row
from harness.fields.table import TEMPLATE
from harness.fields.values import Cell, cells_of
from harness.fields.vehicle import Vehicle
from harness.model.knobs import KNOBS, SETTINGS, Knobs
from kvm_ioctl.handles import Kvm

Emit = Callable[..., None]


class Runner:
    """Runs cells, each in a VM that no cell before has broken."""

    def __init__(self, kvm: Kvm, knobs: Knobs) -> None:
        """Run on a KVM; the model has these knobs."""
        self._kvm = kvm
        self._knobs = knobs
        self._stack = ExitStack()
        self._vehicle: Vehicle | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._drop()

    @property
    def vehicle(self) -> Vehicle:
        """The VM; a new one if the last is of no more use."""
        if self._vehicle is None:
            self._vehicle = self._stack.enter_context(Vehicle(self._kvm))
        return self._vehicle

    def cells(self, field: str) -> list[Cell]:
        """Return the cells of a field, or of TEMPLATE."""
        if field == TEMPLATE:
            return [Cell(TEMPLATE, "unchanged", {})]
        return cells_of(field, self.vehicle.template)

    def row(self, cell: Cell) -> Row:
        """Return what a cell came to, and what was predicted."""
        vehicle = self.vehicle
        fields = vehicle.fields(cell.changes)
        predicted = predict(vehicle, fields, self._knobs)
        set_state = vehicle.set_nested_state(fields)
        seen = vehicle.vmrun(fields)
        if seen.what == STOPPED:
            self._drop()
        return Row(
            cell.field,
            cell.value,
            cell.changes,
            predicted,
            seen.what,
            seen.how,
            set_state,
            seen.late_is_told,
        )

    def _drop(self) -> None:
        self._stack.close()
        self._vehicle = None


def knobs_of(setting: str, turned: dict[str, str]) -> Knobs:
    """Return a setting of `harness.model.knobs` with knobs turned, as `Knob.key_of` names values.

    Raises KeyError: there is no such setting, knob or value.
    """
    changes = {name: KNOBS[name].value_of(key) for name, key in turned.items()}
    return SETTINGS[setting].but(**changes)


def run_fields(
    emit: Emit,
    *,
    fields: Sequence[str],
    setting: str,
    turned: dict[str, str],
    only: Sequence[str] | None = None,
) -> int:
    """Run the cells of fields, the rows of each being emitted together; return how many.

    Args:
        emit: takes the kind `rows`, with `field` and `rows`.
        fields: names as in `harness.fields.values.ALL_FIELDS`, or TEMPLATE.
        setting: see `knobs_of`.
        turned: see `knobs_of`.
        only: these values only.

    """
    count = 0
    with Kvm() as kvm, Runner(kvm, knobs_of(setting, turned)) as runner:
        for name in fields:
            cells = [c for c in runner.cells(name) if only is None or c.value in only]
            rows = [runner.row(cell).to_json() for cell in cells]
            emit("rows", field=name, rows=rows)
            count += len(rows)
    return count


def cells_here(emit: Emit, *, field: str) -> list[dict[str, Any]]:
    """Return the values of a field that are tried, and what they change."""
    with Kvm() as kvm, Runner(kvm, SETTINGS["7.3"]) as runner:
        return [{"value": c.value, "changes": dict(c.changes)} for c in runner.cells(field)]
