"""`nsvm migrate --matrix ... --live --link LINK`, without booting anything."""

import base64
import queue

import pytest
from nsvm_process import Nsvm

from harness.network.shape import LinkShape
from harness.runner import matrix
from harness.storm.relay import EVENT

MATRIX = ["migrate", "--matrix", "6.1,7.3"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([*MATRIX, "--live", "--link", "rate=10"], "nsvm: link: rate=10: a number with one of"),
        ([*MATRIX, "--live", "--link", ""], "nsvm: link: '' is none of rate="),
        ([*MATRIX, "--live", "--link", "loss=2"], "nsvm: link: loss=2: a number with one of %"),
        ([*MATRIX, "--link", "loss=1%"], "--link goes with --from, or with --matrix and --live"),
        (
            ["migrate", "--storm", "1", "--link", "loss=1%"],
            "--link goes with --from, or with --matrix and --live",
        ),
    ],
)
def test_a_wrong_link_is_one_line(arguments, complaint):
    with Nsvm(*arguments) as used:
        status, output = used.end()
    assert status == 2
    assert complaint in output
    assert "Traceback" not in output


class FakeSession:
    """Keeps what it is told."""

    def __init__(self):
        self.lines = queue.Queue()

    def send_input(self, text):
        self.lines.put(text)


def event(data):
    return {"event": "emit", "kind": EVENT, "data": {"data": base64.b64encode(data).decode()}}


@pytest.mark.parametrize("shaped", [False, True])
def test_what_a_host_gives_out_reaches_the_other_one(shaped, request):
    source, target = FakeSession(), FakeSession()

    def pass_on(between):
        with matrix._relaying(between, source, target) as (from_source, from_target):
            from_source({"event": "heartbeat"})
            for take, there, data in [
                (from_source, target, b"there"),
                (from_target, source, b"back"),
            ]:
                take(event(data))
                line = there.lines.get(timeout=60)
                assert line.endswith("\n")
                assert base64.b64decode(line) == data
            from_source(event(b""))
            assert target.lines.get(timeout=60) == "\n"

    if not shaped:
        pass_on(None)
        return
    with request.getfixturevalue("lay")(LinkShape.parse("delay=5ms,loss=1%")) as between:
        pass_on(between)
