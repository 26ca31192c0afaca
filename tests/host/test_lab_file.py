"""lab.toml: what it may say, and the one line for what it must not."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from harness.commands.memory import command as memory
from harness.host.lab_file import LabError, LabHost, find_host, lab_path, parameter, read_lab


def read(tmp_path, text):
    path = tmp_path / "lab.toml"
    path.write_text(text)
    return read_lab(path)


def test_a_host_is_one_line(tmp_path):
    hosts = read(tmp_path, '[hosts]\nzen2 = "zen2.lab"\nzen4 = { address = "::1", port = 2222 }\n')
    known = Path("~/.ssh/known_hosts").expanduser()
    assert hosts["zen2"] == LabHost("zen2", "zen2.lab", known_hosts=known)
    assert hosts["zen4"].label == "root@::1:2222"


def test_defaults_are_for_hosts_that_do_not_say_otherwise(tmp_path):
    text = """
        [defaults]
        user = "nsvm"
        sudo = true
        reconnect_s = 5
        [hosts.zen2]
        address = "zen2.lab"
        [hosts.zen4]
        address = "zen4.lab"
        user = "root"
        sudo = false
        params = { npt = 0, vgif = true }
    """
    hosts = read(tmp_path, text)
    assert (hosts["zen2"].user, hosts["zen2"].sudo, hosts["zen2"].reconnect_s) == ("nsvm", True, 5)
    assert (hosts["zen4"].user, hosts["zen4"].sudo) == ("root", False)
    assert hosts["zen4"].params == {"npt": "0", "vgif": "1"}


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("[hosts.a]\nport = 22\n", ":1: hosts.a", "no address"),
        ('[hosts.a]\naddress = "a"\nprot = 22\n', ":3: hosts.a.prot", "no such key; there are add"),
        ('[hosts.a]\naddress = "a"\nport = 70000\n', ":3: hosts.a.port", "70000 is no port"),
        ('[hosts.a]\naddress = "a"\nport = true\n', ":3: hosts.a.port", "True is no port"),
        ('[hosts.a]\naddress = "-oProxyCommand=x"\n', ":2: hosts.a.address", "begins with '-'"),
        ('[hosts.a]\naddress = "a b"\n', ":2: hosts.a.address", "has a space"),
        ('[hosts.a]\naddress = ""\n', ":2: hosts.a.address", "a text, please"),
        ('[hosts.a]\naddress = "a"\nkey = "/no/key"\n', ":3: hosts.a.key", "no file /no/key"),
        ('[hosts.a]\naddress = "a"\nsudo = 1\n', ":3: hosts.a.sudo", "neither true nor false"),
        ('[hosts.a]\naddress = "a"\nlinger_s = 0\n', ":3: hosts.a.linger_s", "no number of sec"),
        ('[hosts.a]\naddress = "a"\nparams = 1\n', ":3: hosts.a.params", "a table, please"),
        ('[hosts.a]\naddress = "a"\nparams = { "a b" = 1 }', ":3: hosts.a.params", "of the form"),
        ('[hosts]\na = "a"\nb = { address = "b", prot = 1 }\n', ":3: hosts.b.prot", "no such key"),
        ("[hosts]\na = 1\n", ":2: hosts.a", "a table, please"),
        ('[hosts]\n"a;b" = "a"\n', ":2: hosts.a;b", "a host's name has letters"),
        ('[defaults]\naddress = "a"\n', ":2: defaults.address", "each host has one of its own"),
        ("[host.a]\n", ": host", "no such table"),
        ("hosts = 1\n", ":1: hosts", "a table, please"),
        ("[hosts\n", ": ", "line 1, column 7"),
    ],
)
def test_what_is_wrong_is_one_line_with_the_place(tmp_path, text, place, what):
    with pytest.raises(LabError) as error:
        read(tmp_path, text)
    said = str(error.value)
    assert said.startswith(f"{tmp_path / 'lab.toml'}{place}")
    assert what in said
    assert "\n" not in said


def test_a_file_that_is_not_there_says_where_it_is_looked_for(tmp_path, monkeypatch):
    with pytest.raises(LabError, match=r"no such file \(--lab FILE, or \$NSVM_LAB\)"):
        find_host("a", tmp_path / "none")
    monkeypatch.delenv("NSVM_LAB", raising=False)
    assert lab_path() == Path("lab.toml")
    monkeypatch.setenv("NSVM_LAB", "/etc/nsvm/lab.toml")
    assert lab_path() == Path("/etc/nsvm/lab.toml")
    assert lab_path(Path("other")) == Path("other")


@pytest.mark.parametrize("text", ["npt", "npt=", "=1", "npt=a b", "npt=1;x", "-npt=1", "NPT=1"])
def test_a_parameter_is_a_name_and_a_word(text):
    with pytest.raises(ValueError, match="is not of the form npt=0"):
        parameter(text)
    done = CliRunner().invoke(memory, ["--param", text])
    assert done.exit_code == 2
    assert "is not of the form npt=0" in done.output


@pytest.mark.parametrize("host", ["ssh", "ssh:", "remote", ""])
def test_a_host_that_is_none(host):
    done = CliRunner().invoke(memory, ["--host", host])
    assert done.exit_code == 2
    assert "is not one of auto, local, emulated, ssh:NAME" in done.output
