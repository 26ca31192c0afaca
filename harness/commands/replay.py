"""`nsvm replay`: repeat what a cross-check recorded, on any host and kernel."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from harness.commands.crosscheck_run import repeat
from harness.commands.options import host_choice, host_options
from harness.commands.output import log
from harness.crosscheck.record import Bundle, read_bundle, steps_in_words, told
from harness.crosscheck.settings import chosen
from harness.errors import HostLost
from harness.probe.kmsg import splats
from harness.runner.hosts import make_host


@click.command("replay")
@click.argument("bundle_file", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option(
    "--knobs",
    "words",
    multiple=True,
    metavar="NAME|KNOB=VALUE",
    help="As for `nsvm crosscheck`; by default those of the kernel that it runs on.",
)
@host_options
def command(
    bundle_file: Path,
    words: tuple[str, ...],
    host: str,
    kernel: str | None,
    modules: Path | None,
) -> None:
    """Repeat a recorded sequence on the model and on a kernel, and say whether they agree.

    Exit status: 0 they agree, 1 they differ (as recorded, or otherwise), 2 the harness broke.
    """
    bundle = read_bundle(bundle_file)
    console = Console(highlight=False, soft_wrap=True)

    def say(text: str) -> None:
        console.print(text, markup=False)

    with make_host(host_choice(host, kernel, modules), log=log) as where:
        session = where.start()
        release = str(where.describe()["kernel_release"])
        setting = chosen(words, release)
        say(f"recorded     {bundle.kernel}, knobs of {bundle.setting}: {bundle.what}")
        say(f"kernel       {release}, knobs of {setting}")
        for line in steps_in_words(bundle.operations):
            say(f"  {line}")
        try:
            result = repeat(session, bundle.operations, setting)
        except HostLost as e:
            say(f"the host was lost: {e}")
            sys.exit(1)
        complaints = splats(event["text"] for event in result.kmsg)
        found = result.unwrap("the repetition")
    for line in complaints:
        say(f"kernel log   {line}")
    say(_verdict(bundle, found, bool(complaints)))
    for turn in found.get("explained_by", ()):
        say(f"  would agree with {turn}")
    sys.exit(1 if found["difference"] or complaints else 0)


def _verdict(bundle: Bundle, found: dict[str, Any], complained: bool) -> str:
    difference = found["difference"]
    if not difference:
        how = "the kernel complained" if complained else "agrees"
        return f"{how}: {found['steps']} steps as the model says"
    names = ("step", "name", "seen")
    recorded = all(difference[name] == bundle.difference.get(name) for name in names)
    return f"{'differs as recorded' if recorded else 'differs'}: {told(difference)}"
