"""The HTML page: self-contained, readable, and not to be scripted by what hosts say."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from nights import HOSTILE, begin, end, note, on, write_run

from harness.report.bugs import Bug, Bugs
from harness.report.history import lines_of
from harness.report.page import render
from harness.report.store import Store
from harness.runner.known_issues import KnownIssue

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
               None)  # fmt: skip

WARNING = "WARNING: CPU: 0 PID: 1 at arch/x86/kvm/svm/nested.c:957 nested_svm_vmexit+0x6d1/0x740"
LOG = f"before\n--[ cut here ]--\n{WARNING}\nCall Trace:\n---[ end trace 0 ]---\nlater"


def night(number, host):
    """Two hosts' nights: a case breaks, one is mended, one is flaky."""
    last = number == 3
    return [
        begin("passes[npt=True]", 3),
        end("passes[npt=True]", host=host),
        note("passes[npt=True]", "bytes per vCPU", on=12288.0 + 4096 * last),
        note("passes[npt=True]", "live migration", downtime_s=0.02 * (number + 1)),
        end("breaks", "FAIL" if last else "PASS", f"kernel: {WARNING}", host=host,
            **{"kernel log": LOG, "traceback": "Traceback of it"}),
        end("mended", "PASS" if last else "FAIL", "hsave.CR3: expected 1, saw 0", host=host),
        end("flaky", "FAIL" if number % 2 else "PASS", "EVENTINJ.V: expected 0, saw 1", host=host),
        end("known", "FAIL", "GIF: expected 0, saw 1", known="some-issue", host=host),
    ]  # fmt: skip


ISSUE = KnownIssue("some-issue", ("known",), "GIF is set", "no reason", "seen", ("6.1", "7.3"))


@pytest.fixture
def page(tmp_path):
    """Return the page of four nights of two lines, and of whatever else is given."""

    def make(*events, issues=(ISSUE,), bugs=None):
        with Store(None) as store:
            for number in range(4):
                for release in ("6.1.0-56-amd64", "7.3.4"):
                    run = night(number, on(release)) + (list(events) if number == 3 else [])
                    where = tmp_path / f"{release}-{number}"
                    argv = ["--kernel", release[:3], "-j", "1"]
                    store.add_results(write_run(where, run, at=1e9 + number * 86400, argv=argv))
            return render(store, lines_of(store), issues, bugs=bugs)

    return make


class Outline(HTMLParser):
    """Collects tags with their attributes, and checks that they are closed."""

    VOID = ("meta", "br", "img", "link", "base")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def text_of(page):
    return " ".join(" ".join(Outline(page).words).split())


@pytest.mark.parametrize(
    "told",
    [
        "2 of 2 red",
        "lab1 (emulated)",
        "6.1.0-56-amd64",
        "nsvm run --kernel 7.3 --case breaks",
        "Claim of breaks.",
        f"kernel: {WARNING}",
        "Call Trace: ---[ end trace 0 ]---",
        "Traceback of it",
        "hsave.CR3: expected 1, saw 0",
        "2 of 4",
        "15% to 85%",
        "16,384 B",
        "80 ms",
        "some-issue",
        "GIF is set",
        "6.1, 7.3",
        "kvm_amd.npt",
        "emulated (QEMU 7.2.22, TCG)",
        "deepest guest L3",
    ],
)
def test_the_page_says(page, told):
    assert told in text_of(page())


def test_nothing_is_fetched_and_nothing_is_run(page):
    outline = Outline(page())
    assert not {tag for tag, _ in outline.tags} & {"script", "img", "link", "iframe", "object"}
    for tag, attributes in outline.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href"):
                assert value.startswith("#")
    policy = [a["content"] for tag, a in outline.tags if a.get("http-equiv")]
    assert policy[0].startswith("default-src 'none';")
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", page())


def test_hostile_strings_stay_strings(page):
    event = end(HOSTILE, "FAIL", HOSTILE, known="", host={**on("6.1.0-56-amd64"), HOSTILE: HOSTILE},
                **{HOSTILE: HOSTILE})  # fmt: skip
    event["claim"] = HOSTILE
    hostile, plain = page(event), page()
    assert {tag for tag, _ in Outline(hostile).tags} == {tag for tag, _ in Outline(plain).tags}
    assert HOSTILE in text_of(hostile)
    assert "<script" not in hostile
    assert "{{7*7}}" in hostile


def test_a_hostile_host_stays_a_string_in_the_plots(page, tmp_path):
    events = [note("a", "bytes per vCPU", on=1.0), end("a", host={**on(HOSTILE), "name": HOSTILE})]
    with Store(None) as store:
        store.add_results(write_run(tmp_path / "x", events, machine=HOSTILE, argv=[HOSTILE]))
        made = render(store, lines_of(store))
    assert "<img" not in made
    assert HOSTILE in text_of(made)


def test_what_only_some_cases_ran_on_is_told_apart(page):
    host = {**on("6.1.0-56-amd64"), "guest_linux": "6.1.0-99-amd64",
            "module_parameters": {"kvm_amd.nested": "1", "kvm_amd.npt": "N"}}  # fmt: skip
    text = text_of(page(end("other", host=host)))
    assert "L0: other parameters, for some cases kvm_amd.npt N" in text
    assert "Linux, in its scenarios 6.1.0-99-amd64" in text
    assert "other parameters" not in text_of(page())


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome")
def test_a_browser_shows_it_and_runs_nothing_of_it(page, tmp_path):
    event = end(HOSTILE, "FAIL", HOSTILE, **{"kernel log": HOSTILE})
    file = tmp_path / "report.html"
    file.write_text(page(event), encoding="utf-8")
    common = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
              f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,2000"]  # fmt: skip
    shot = tmp_path / "report.png"
    for more in (["--dump-dom"], [f"--screenshot={shot}"]):
        done = subprocess.run([*common, *more, file.as_uri()], capture_output=True, text=True,
                              timeout=120, check=True)  # fmt: skip
        if more == ["--dump-dom"]:
            dom = done.stdout
    assert "owned" not in re.search(r"<title>(.*?)</title>", dom)[1]
    assert "<script" not in dom
    assert dom.count('<svg xmlns="http://www.w3.org/2000/svg"') == 2
    assert 'class="banner red"' in dom
    # A PNG's header: width and height. A page that shows nothing compresses to a few kilobytes.
    head = shot.read_bytes()
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(head[16:20]), int.from_bytes(head[20:24])) == (1280, 2000)
    assert len(head) > 50_000


def test_bugs_that_were_put_back_are_scored_by_area(page):
    bugs = Bugs(
        "6.1",
        (
            Bug("rsm-bug", "SMM", ("smi_in_l2",), "", ()),
            Bug("gif-bug", "SMM", (), HOSTILE, ("smm_test",)),
            Bug("missed-bug", "#VMEXIT", (), "", ()),
        ),
    )
    text = page(bugs=bugs)
    words = " ".join(Outline(text).words)
    assert HOSTILE not in text
    assert re.search(r"SMM\s+2\s+2\s+1\b", words)
    assert re.search(r"#VMEXIT\s+1\s+0\s+0\b", words)
    assert re.search(r"missed-bug\s+missed", words)
    assert "Bugs put back" not in page()
