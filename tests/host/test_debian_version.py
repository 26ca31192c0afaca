import itertools
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.host.debian_version import sort_key

ASCENDING = [
    "0.9", "1.0~rc1-1", "1.0~rc1-2", "1.0-1~bpo12+1", "1.0-1", "1.0-1+b1", "1.0-1.1", "1.0a-1",
    "1.0+deb12-1", "1.0.1-1", "1.2-1", "1.10-1", "6.1.9-1", "6.1.176-1", "6.1.192-1~deb11u1",
    "6.1.192-1", "6.1.192-2", "6.12.117-1", "1:0.1-1", "2:0-0",
]  # fmt: skip


def test_known_versions_sort_in_order():
    assert sorted(reversed(ASCENDING), key=sort_key) == ASCENDING


@pytest.mark.parametrize(("one", "other"), [("1.0", "1.0-0"), ("0:1", "1"), ("1.01", "1.1")])
def test_equal_versions_have_equal_keys(one, other):
    assert sort_key(one) == sort_key(other)


versions = st.from_regex(r"([01]:)?[0-9][0-9ab.+~]{0,4}(-[0-9a~+.]{1,3})?", fullmatch=True)
suffixes = st.from_regex(r"[0-9a][0-9ab.+~]{0,4}", fullmatch=True)


@given(versions, suffixes)
def test_a_tilde_sorts_before_the_bare_version_and_a_plus_after_it(version, suffix):
    bare = sort_key(version)
    assert sort_key(f"{version}~{suffix}") < bare < sort_key(f"{version}+{suffix}")


@pytest.mark.skipif(not shutil.which("dpkg"), reason="dpkg is not installed")
def test_neighbours_agree_with_dpkg():
    for lower, higher in itertools.pairwise(ASCENDING):
        command = ["dpkg", "--compare-versions", lower, "lt", higher]
        assert subprocess.run(command, timeout=10).returncode == 0, (lower, higher)
