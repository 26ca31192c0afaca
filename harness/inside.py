"""What the agent calls inside a host. Standard library only."""

from __future__ import annotations

import contextlib
import importlib
import linecache
import os
import sys
import traceback
from types import ModuleType
from typing import Any

from harness.errors import HarnessError, HostError, ScenarioFailure, Unsupported
from harness.facts import HostView
from harness.probe import memcg, tracefs
from harness.scenarios.case import FRESH, LIFECYCLE, Scenario, scenario_of
from harness.scenarios.context import Context, Emit
from harness.scenarios.measure import measure_nested_memory
from kvm_ioctl.request import KvmError

__all__ = ["check_needs", "measure_nested_memory", "ping", "remove_leftovers", "run_case"]


def ping(emit: Emit) -> int:
    """Return the process id of this call: a sign of life."""
    return os.getpid()


def remove_leftovers() -> None:
    """Remove the cgroups, trace instances and kprobes of processes of ours that are gone."""
    with contextlib.suppress(HostError, OSError):
        memcg.remove_leftovers(memcg.mount_point()[0])
    with contextlib.suppress(HostError, OSError):
        tracefs.remove_leftovers()


def check_needs(declared: Scenario, host: HostView) -> None:
    """Ask the host every fact that the scenario needs.

    Raises:
        Unsupported: a fact says no; the message is its evidence.
        HostError: the host cannot answer, which is not "no".
    """
    for need in declared.needs:
        fact = need(host)
        if not fact.holds:
            raise Unsupported(f"{need.__name__}: {fact.evidence}")


def _load(module: str, source: str | None) -> ModuleType:
    """Return a scenario module: one of the tree's own, or one that came along as text."""
    if source is None:
        return importlib.import_module(module)
    loaded = ModuleType(module)
    # Classes look their module up by its name: dataclasses does.
    sys.modules[module] = loaded
    # Lines of a traceback are looked up by file name.
    linecache.cache[module] = (len(source), None, source.splitlines(keepends=True), module)
    exec(compile(source, module, "exec"), vars(loaded))
    return loaded


def run_case(
    emit: Emit,
    module: str,
    name: str,
    values: dict[str, Any],
    source: str | None = None,
    lifecycle: str | None = None,
) -> dict[str, str]:
    """Run one case; return its verdict (PASS, FAIL, SKIP or ERROR) and the reason.

    `lifecycle` counts in place of what the scenario says of it.

    A `KvmError` that escapes the scenario's body is KVM's answer to something that must work: FAIL.
    """
    declared = scenario_of(getattr(_load(module, source), name))
    if declared is None:
        raise HarnessError(f"{module}.{name} is no scenario")
    own = {axis: value for axis, value in values.items() if axis != LIFECYCLE}
    lived = lifecycle or values.get(LIFECYCLE, FRESH)
    try:
        check_needs(declared, HostView())
        with Context(emit, lived) as context:
            declared.function(context, **own)
    except Unsupported as e:
        return {"verdict": "SKIP", "reason": str(e)}
    except ScenarioFailure as e:
        return {"verdict": "FAIL", "reason": str(e), "trace": traceback.format_exc()}
    except HostError as e:
        return {"verdict": "ERROR", "reason": str(e), "trace": traceback.format_exc()}
    except KvmError as e:
        return {"verdict": "FAIL", "reason": str(e), "trace": traceback.format_exc()}
    except Exception as e:
        reason = f"{type(e).__name__}: {e}"
        return {"verdict": "ERROR", "reason": reason, "trace": traceback.format_exc()}
    return {"verdict": "PASS", "reason": ""}
