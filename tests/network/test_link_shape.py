import pytest

from harness.network.devices import netem_options
from harness.network.shape import LinkShape, ShapeError

GIVEN = {
    "rate=10mbit,delay=20ms,loss=1%": LinkShape(rate_bit_s=10e6, delay_s=0.02, loss=0.01),
    "delay=1s, jitter=500us": LinkShape(delay_s=1.0, jitter_s=0.0005),
    "delay=1.5ms,duplicate=.5%,reorder=25%": LinkShape(
        delay_s=0.0015, duplicate=0.005, reorder=0.25
    ),
    "loss=100%": LinkShape(loss=1.0),
    "rate=1Gbit,limit=10": LinkShape(rate_bit_s=1e9, limit_packets=10),
    "rate=64000bit": LinkShape(rate_bit_s=64e3),
}


@pytest.mark.parametrize("text", GIVEN)
def test_what_is_written_is_read(text):
    shape = LinkShape.parse(text)
    assert shape == GIVEN[text]
    assert LinkShape.parse(str(shape)) == shape
    assert LinkShape.from_json(shape.to_json()) == shape


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "'' is none of rate=10mbit"),
        ("rate", "'rate' is none of"),
        ("speed=1mbit", "'speed=1mbit' is none of"),
        ("rate=10", "rate=10: a number with one of bit, kbit, mbit, gbit, please"),
        ("rate=-1mbit", "a number with"),
        ("rate=1bit", "from 8kbit to 34gbit"),
        ("rate=99gbit", "from 8kbit to 34gbit"),
        ("rate=nanmbit", "a number with"),
        ("rate=" + "9" * 400 + "mbit", "is too much"),
        ("delay=20", "delay=20: a number with one of us, ms, s, please"),
        ("delay=61s", "60s at most"),
        ("loss=1", "a number with one of %, please"),
        ("loss=101%", "100% at most"),
        ("loss=1%,loss=2%", "loss is there twice"),
        ("limit=0", "a number of packets, please"),
        ("limit=1.5", "a number of packets, please"),
        ("reorder=1%", "reorder needs a delay"),
        ("delay=1ms,jitter=2ms", "jitter is more than delay"),
        ("rate=1mbit,", "'' is none of"),
    ],
)
def test_what_is_no_link_is_refused_in_one_line(text, complaint):
    with pytest.raises(ShapeError) as caught:
        LinkShape.parse(text)
    assert complaint in str(caught.value)
    assert str(caught.value).startswith("link: ")
    assert "\n" not in str(caught.value)


def test_netem_is_told_in_its_units():
    shape = LinkShape.parse("rate=8mbit,delay=20ms,jitter=1ms,loss=1%,duplicate=2%,reorder=3%")
    assert netem_options(shape) == {
        "delay": 20_000,
        "jitter": 1000,
        "loss": pytest.approx(1),
        "duplicate": pytest.approx(2),
        "prob_reorder": pytest.approx(3),
        "limit": 1000,
        "netem_rate": 1_000_000,
    }
    assert netem_options(LinkShape())["netem_rate"] == 0
