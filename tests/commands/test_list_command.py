"""`nsvm list`: every scenario, with what one needs to choose among them."""

import json

from click.testing import CliRunner

from harness.commands.list import all_scenarios, command
from harness.scenarios.case import cases_of


def test_json_has_every_scenario_and_case():
    result = CliRunner().invoke(command, ["--json"])
    listed = json.loads(result.output)
    declared = [scenario for _, scenario in all_scenarios()]
    assert [entry["name"] for entry in listed] == [scenario.name for scenario in declared]
    assert [entry["cases"] for entry in listed] == [
        [case.id for case in cases_of(scenario)] for scenario in declared
    ]
    [entry] = [e for e in listed if e["name"] == "svme_set_allocates_and_cleared_frees"]
    assert entry["needs"] == ["nested_svm"]
    assert entry["axes"]["path"] == ["wrmsr", "msrs", "sregs"]
    assert [entry["quick"] for entry in listed] == [scenario.quick for scenario in declared]


def test_the_table_has_every_name():
    result = CliRunner().invoke(command, [], env={"COLUMNS": "300"})
    for _, scenario in all_scenarios():
        assert scenario.name in result.output
