"""Choosing a host, and keeping sessions on it."""

import errno

import pytest

from harness.errors import HostError, HostLost
from harness.facts import HostView
from harness.runner import hosts
from harness.runner.hosts import HostChoice, HostPool, make_host, on_session


class View(HostView):
    """A machine whose kvm_amd has `nested`, and whose /dev/kvm answers with `error`."""

    def __init__(self, nested, error=0):
        self.nested, self.error = nested, error

    def param(self, module, name):
        return self.nested

    def kvm_modules(self):
        return [] if self.nested is None else ["kvm_amd"]

    def open_errno(self, path, flags=0):
        return self.error


@pytest.mark.parametrize(
    ("choice", "view", "kind"),
    [
        (HostChoice(), View("1"), "local"),
        (HostChoice(), View("Y"), "local"),
        (HostChoice(), View("0"), "emulated"),
        (HostChoice(), View(None), "emulated"),
        (HostChoice(), View("1", errno.ENOENT), "emulated"),
        (HostChoice(kernel="6.1"), View("1"), "emulated"),
        (HostChoice("emulated"), View("1"), "emulated"),
        (HostChoice("local"), View(None), "local"),
    ],
)
def test_auto_is_local_where_nested_svm_is(choice, view, kind):
    assert choice.resolved(view) == kind


def test_a_device_that_refuses_is_no_reason_to_go_elsewhere():
    """Emulating in silence what the user has in silicon would be a broken lab that looks green."""
    with pytest.raises(HostError, match=r"/dev/kvm: Permission denied \(run as root"):
        HostChoice().resolved(View("1", errno.EACCES))


def test_a_choice_that_contradicts_itself_is_refused():
    with pytest.raises(HostError, match=r"--kernel .* cannot go with local"):
        HostChoice("local", "6.1").resolved()
    with pytest.raises(HostError, match=r"--kernel .* cannot go with local"):
        make_host(HostChoice("local", "6.1"))


class FakeHost:
    def __init__(self, kind, params):
        self.kind, self.params = kind, params
        self.starts, self.closed = 0, False

    def start(self):
        self.starts += 1
        return f"session {self.starts} of {self.params}"

    def describe(self):
        return {"kind": self.kind, "params": self.params}

    def close(self):
        self.closed = True


@pytest.fixture
def pool(monkeypatch):
    """Return a function that opens a pool of fake hosts of one kind."""
    made = []

    def make(choice, params, log, *, keep_spare):
        made.append(FakeHost(choice.host, dict(params)))
        made[-1].keeps_spare = keep_spare
        return made[-1]

    monkeypatch.setattr(hosts, "make_host", make)

    def open_pool(kind, **options):
        return HostPool(HostChoice(kind), **options)

    open_pool.made = made
    return open_pool


def starts(pool):
    return [host.starts for host in pool.made]


def test_every_case_gets_a_fresh_emulated_machine(pool):
    with pool("emulated") as opened:
        sessions = [opened.session({})[1] for _ in range(3)]
    assert starts(pool) == [3]
    assert len(set(sessions)) == 3
    # The next one is started while this one works.
    assert [host.keeps_spare for host in pool.made] == [True]


@pytest.mark.parametrize(("kind", "options"), [("local", {}), ("emulated", {"fresh": False})])
def test_a_local_host_and_a_shared_machine_are_kept(pool, kind, options):
    with pool(kind, **options) as opened:
        sessions = [opened.session({})[1] for _ in range(3)]
    assert starts(pool) == [1]
    assert len(set(sessions)) == 1
    assert [host.keeps_spare for host in pool.made] == [options.get("fresh", True)]


def test_a_dropped_session_is_made_anew(pool):
    with pool("local") as opened:
        opened.session({})
        opened.drop({})
        opened.session({})
    assert starts(pool) == [2]


def test_each_set_of_parameters_has_a_host_of_its_own(pool):
    with pool("local") as opened:
        opened.session({"nested": "0", "npt": "1"})
        opened.session({"npt": "1", "nested": "0"})
        opened.session({})
        assert opened.has({"nested": "0", "npt": "1"})
        assert not opened.has({"nested": "0"})
        assert [d["params"] for d in opened.describe()] == [{"nested": "0", "npt": "1"}, {}]
    assert starts(pool) == [1, 1]


@pytest.mark.parametrize("kind", ["local", "ssh"])
@pytest.mark.parametrize("dropped", [False, True])
def test_a_real_machine_has_one_set_of_parameters_at_a_time(pool, kind, dropped):
    with pool(kind) as opened:
        first, _ = opened.session({"npt": "0"})
        if dropped:
            opened.drop({"npt": "0"})
        second, _ = opened.session({})
        assert (first.closed, second.closed) == (True, False)
        opened.session({"npt": "0"})
    assert starts(pool) == [2, 1]


def test_a_lab_machine_is_made_from_its_entry(tmp_path):
    lab = tmp_path / "lab.toml"
    lab.write_text('[hosts]\nzen4 = "zen4.lab"\n')
    choice = HostChoice("ssh:zen4", lab=lab, params=(("npt", "0"), ("vgif", "0")))
    host = make_host(choice, {"vgif": "1"})
    assert (host.kind, host.lab.label) == ("ssh", "root@zen4.lab")
    # A scenario's own parameters count more than the command line's.
    assert host.params == {"npt": "0", "vgif": "1"}
    with pytest.raises(HostError, match=r"--kernel .* cannot go with ssh:zen4"):
        make_host(HostChoice("ssh:zen4", "6.1", lab=lab))


def test_all_hosts_are_closed_at_the_end_whatever_happens(pool):
    def fail():
        with pool("local") as opened:
            opened.session({})
            opened.session({"nested": "0"})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [host.closed for host in pool.made] == [True, True]


@pytest.mark.parametrize("times", [0, 1, 2])
def test_a_host_that_hangs_silently_is_asked_once_more(times):
    host, said = FakeHost("emulated", {}), []

    def use(session):
        if host.starts <= times:
            raise HostLost("it hangs", silent=True)
        return session

    if times < 2:
        assert on_session(host, use, said.append) == f"session {times + 1} of {{}}"
    else:
        with pytest.raises(HostLost, match="it hangs"):
            on_session(host, use, said.append)
    assert said == ["it hangs; once more"] * min(times, 1)


def test_a_host_that_died_is_not_asked_again():
    host = FakeHost("emulated", {})

    def use(session):
        raise HostLost("panic")

    with pytest.raises(HostLost, match="panic"):
        on_session(host, use, lambda text: None)
    assert host.starts == 1
