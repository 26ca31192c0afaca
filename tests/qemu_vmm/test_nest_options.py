"""Options of `nsvm nest` that contradict each other."""

import pytest
from click.testing import CliRunner

from harness.commands.nest import command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--vmm", "qemu", "--smis", "1"], "--smis cannot go with --vmm qemu"),
        (["--move-over", "tcp", "--moves", "1"], "--move-over chooses what QEMU migrates over"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_booted(arguments, said):
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 2
    assert said in done.output
