"""Scenario modules as pytest collects them: the tree's own by name, a user's own by path."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

import pytest

import harness.scenarios

_OWN = Path(harness.scenarios.__file__).parent


class ScenarioModule(pytest.Module):
    """A file with scenarios. One that cannot be imported is one line, with the place."""

    def _getobj(self) -> ModuleType:
        try:
            return load(self.path)
        except Exception as e:
            raise self.CollectError(explain(self.path, e)) from e


class _FromSource(SourceFileLoader):
    """Compiles anew: a kept .pyc counts as good if size and second of the last change agree."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        code: CodeType = self.source_to_code(self.get_data(path), path)
        return code


def load(path: Path) -> ModuleType:
    """Import a scenario module.

    A user's own file goes by its whole path: by its name it might be taken for a module that is
    loaded already (`bisect.py`).
    """
    if path.parent == _OWN:
        return importlib.import_module(f"{harness.scenarios.__name__}.{path.stem}")
    name = str(path)
    loader = _FromSource(name, name)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def explain(path: Path, error: Exception) -> str:
    """Return ``file:line: what is wrong``, the line being the last one in that file."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}:{error.lineno}: {error.msg}"
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(path)
    ]
    where = f"{path}:{lines[-1]}" if lines else str(path)
    return f"{where}: {type(error).__name__}: {error}"
