"""A junit.xml that is as red as the run it is of.

pytest writes one that has no failure in it when nothing ran, or all was skipped, or the run itself
broke; whoever reads JUnit only would take that for green.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from harness.errors import HostError

#: The test case that stands for the run as a whole.
CASE = "the run"


def add_error(path: Path, message: str) -> None:
    """Add an error to a JUnit file that has neither failure nor error.

    Raises:
        HostError: the file cannot be read or written, or is none.
    """
    try:
        tree = ElementTree.parse(path)
        root = tree.getroot()
        suite = root if root.tag == "testsuite" else root.find("testsuite")
        if suite is None:
            raise HostError(f"{path}: no testsuite in it")
        if suite.find(".//failure") is not None or suite.find(".//error") is not None:
            return
        case = ElementTree.SubElement(suite, "testcase", classname="nsvm", name=CASE, time="0")
        ElementTree.SubElement(case, "error", message=message).text = message
        for attribute in ("errors", "tests"):
            suite.set(attribute, str(int(suite.get(attribute, "0")) + 1))
        tree.write(path, encoding="utf-8", xml_declaration=True)
    except (OSError, ElementTree.ParseError) as e:
        raise HostError(f"{path}: {e}") from e
