"""The READMEs: every command in them is one, with the options that it is shown with."""

import re
import shlex

import click
import pytest

from harness.cli import nsvm
from harness.host.bundle import tree_root

ROOT = tree_root()
READMES = [ROOT / "README.md", *sorted((ROOT / "harness").glob("*/README.md"))]

#: `nsvm ...` in a shell's line, or between backticks; up to a comment, a pipe, or a redirection.
#: One in parentheses is what a message says.
COMMAND = re.compile(r"(?<![\w./(-])nsvm +[a-z][^`|#<>;\n]*")


def names(path):
    return str(path.relative_to(ROOT))


def commands(path):
    """Yield the words of every command that a README shows."""
    text = path.read_text().replace("\\\n", " ")
    code = re.findall(r"^```.*?^```|^ {4}.*?$|`[^`\n]+`", text, re.M | re.S)
    for part in code:
        for match in COMMAND.finditer(part):
            words = match[0].replace("'", '"').split('"')
            # What is quoted is a value, whatever it looks like.
            yield shlex.split(" X ".join(words[::2]))[1:]


def wrong(words):
    """Return what of a command there is not, or None."""
    command, context = nsvm, click.Context(nsvm)
    while isinstance(command, click.Group) and words:
        found = command.get_command(context, words[0])
        if found is None:
            return words[0]
        command, words = found, words[1:]
    known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    asked = (re.match(r"--[a-z][a-z-]*|-[a-zA-Z]\b", word) for word in words)
    return next((option[0] for option in asked if option and option[0] not in known), None)


@pytest.mark.parametrize("path", READMES, ids=names)
def test_commands_and_their_options_are_there(path):
    found = list(commands(path))
    assert found
    assert [(" ".join(words), wrong(words)) for words in found if wrong(words)] == []


@pytest.mark.parametrize("path", READMES, ids=names)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#:]+)\)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", READMES, ids=names)
def test_headings_are_whole_and_code_is_closed(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    assert "```" not in text
    assert [line for line in text.splitlines() if line.startswith("#") and '"' in line] == []


def test_what_is_wrong_is_seen():
    assert wrong(["run", "-k", "x"]) is None
    assert wrong(["rnu"]) == "rnu"
    assert wrong(["run", "--quik"]) == "--quik"
    assert wrong(["kernel", "build", "--variant", "x"]) is None
    assert wrong(["kernel", "build", "--variants", "x"]) == "--variants"
