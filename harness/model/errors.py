"""What the model raises."""

from __future__ import annotations


class ModelBug(AssertionError):
    """An invariant of the model's state does not hold: the model is at fault, not the kernel."""


class BadOperation(ValueError):
    """An operation that names what does not exist: a field, a slot, a register, a feature."""


class CannotKnow(Exception):
    """What comes next depends on something that the model does not hold; never leaves it."""
