"""What is tested. Each module reads like the manual; each function is one claim.

Scenarios run inside a host, where only the standard library is. What collects and judges them from
outside is `harness.runner`.
"""

from harness.scenarios.case import Case, Scenario, cases_of, scenario
from harness.scenarios.context import Context

__all__ = ["Case", "Context", "Scenario", "cases_of", "scenario"]
