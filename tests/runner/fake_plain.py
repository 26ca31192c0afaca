"""A plugin for plain pytest: hosts on which every case passes, or does what its name is given.

`FATES` in the environment: verdicts by case id, as JSON.
"""

import json
import os

from fake_pool import FakePool, returned

from harness.runner import run
from harness.scenarios.case import Case, scenario_of


class Session:
    def call(self, target, *, module, name, values, **rest):
        declared = scenario_of(getattr(__import__(module, fromlist=[name]), name))
        fates = json.loads(os.environ.get("FATES", "{}"))
        verdict = fates.get(Case(declared, values).id, "PASS")
        if verdict == "INTERRUPT":
            raise KeyboardInterrupt
        return returned(verdict, "" if verdict == "PASS" else f"a reason to {verdict}")


class Pool(FakePool):
    def session(self, params):
        return self._host, Session()


run.HostPool = Pool
