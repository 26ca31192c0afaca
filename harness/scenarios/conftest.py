"""Lets plain pytest run the scenarios of this directory; see `harness.runner.pytest_options`.

Named by a string, not imported: this directory is carried into hosts, where there is no pytest.
"""

pytest_plugins = ["harness.runner.pytest_options"]
