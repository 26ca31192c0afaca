"""Which knobs a kernel has."""

import pytest

from harness.crosscheck.settings import Setting, UnknownKnob, chosen, setting_for
from harness.model.knobs import SETTINGS


@pytest.mark.parametrize(
    ("release", "name"),
    [
        ("5.10.0-32-amd64", "5.10"),
        ("5.4.0", "before 5.9"),
        ("5.15.3", "5.10"),
        ("6.1.0-55-amd64", "6.1"),
        ("6.12.117+deb12-amd64", "6.12"),
        ("6.18.15+deb13-amd64", "6.12"),
        ("7.3.4+deb13-amd64", "7.3"),
        ("8.0.0-rc1", "7.3"),
    ],
)
def test_a_release_has_the_newest_setting_that_is_not_newer(release, name):
    assert setting_for(release) == name


def test_words_choose_a_setting_and_turn_knobs():
    setting = chosen(["series v2", "vmrun_needs_hsave=true"], "6.1.0")
    assert str(setting) == "series v2, vmrun_needs_hsave=true"
    assert setting.knobs() == SETTINGS["series v2"].but(vmrun_needs_hsave=True)
    assert chosen(["vmrun_needs_hsave=false"], "6.1.0").name == "6.1"


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["9.9"], "no setting is called 9.9"),
        (["moon=1"], "no knob is called moon"),
        (["vmrun_needs_hsave=2"], "has no value 2: there are false, true"),
    ],
)
def test_what_there_is_not_is_refused(words, what):
    with pytest.raises(UnknownKnob, match=what):
        chosen(words, "6.1.0")


def test_a_release_without_a_version_is_refused():
    with pytest.raises(UnknownKnob, match="choose with --knobs"):
        Setting(setting_for("custom"))
