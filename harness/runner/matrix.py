"""Machines saved on one kernel and restored on another: who can, who refuses, what differs.

A kernel is one for an emulated host; ``local`` and ``ssh:NAME`` stand for a host with its own.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Final

from harness.errors import HostError, HostLost, NsvmError
from harness.host.session import CallResult, Event, Host, Session
from harness.network.relay import Relay
from harness.network.shape import LinkShape
from harness.network.wire import Wire, wire
from harness.probe.kmsg import splats
from harness.runner.hosts import SSH, HostChoice, host_name, make_host
from harness.runner.known_issues import KnownIssue
from harness.runner.known_issues import load as load_known_issues
from harness.runner.known_rows import End, known_row
from harness.storm.relay import EVENT

SAVE_S: Final = 240.0
"""How long one machine may take to come to its place and be saved, or to be loaded and live on."""

_WORKERS: Final = 2

_VERDICTS: Final = {"NoTwin": "no twin", "ScenarioFailure": "differs", "KvmError": "refused"}
"""By the exception that ended a call, the closest first."""

Row = dict[str, Any]
Tell = Callable[[Row], None]


class Kernels:
    """One host per kernel; a context manager that ends them."""

    def __init__(
        self,
        specs: Sequence[str],
        log: Callable[[str], None],
        choice: HostChoice | None = None,
    ) -> None:
        """Prepare the hosts; of `choice`, the lab and the module parameters count."""
        self._choice = choice or HostChoice()
        self._issues = load_known_issues()
        self.specs = list(specs)
        self._log = log
        self._stack = ExitStack()
        self._hosts: dict[str, Host] = {}
        self._sessions: dict[str, Session] = {}
        self._borrowed: set[str] = set()
        """Kernels whose host was started by a thread that is not here to stay."""

    def __enter__(self) -> Kernels:
        with ExitStack() as stack:
            for spec in self.specs:
                self._hosts[spec] = stack.enter_context(
                    make_host(self._chosen(spec), log=self._log)
                )
                self._sessions[spec] = self._hosts[spec].start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _chosen(self, spec: str) -> HostChoice:
        if spec == "local" or spec.startswith(SSH):
            try:
                return replace(self._choice, host=host_name(spec), kernel=None, modules=None)
            except ValueError as e:
                raise HostError(str(e)) from None
        return replace(self._choice, host="emulated", kernel=spec, modules=None)

    def release(self, spec: str) -> str:
        """Return the kernel's release."""
        return str(self._hosts[spec].describe()["kernel_release"])

    def issue(self, row: Row) -> KnownIssue | None:
        """Return the known issue that explains why a row differs, if one does."""
        specs = (str(row["from"]), str(row.get("to", row["from"])))
        described = [self._hosts[spec].describe() for spec in specs]
        ends = [End(str(said["kernel_release"]), str(said["kind"])) for said in described]
        return known_row(self._issues, row["place"], ends)

    def describe(self) -> list[dict[str, Any]]:
        """Return the hosts' descriptions."""
        return [host.describe() for host in self._hosts.values()]

    def session(self, spec: str) -> Session:
        """Return a kernel's session."""
        return self._sessions[spec]

    def restart(self, spec: str) -> None:
        """Replace a host that was lost."""
        self._sessions[spec] = self._hosts[spec].start()
        if threading.current_thread() is not threading.main_thread():
            self._borrowed.add(spec)

    def settle(self) -> None:
        """Start again, in this thread, what other threads started: it ends with them."""
        while self._borrowed:
            self.restart(self._borrowed.pop())


def by_file(kernels: Kernels, places: Sequence[str], tell: Tell) -> list[Row]:
    """Save every place on every kernel, and load each on every kernel; return a row for each."""
    saved: dict[tuple[str, str], dict[str, Any]] = {}
    rows: list[Row] = []
    lock = threading.Lock()

    def save(spec: str) -> None:
        for place in places:
            answer = _call(kernels, spec, "harness.storm.calls:depart_from", place=place)
            with lock:
                saved[spec, place] = answer
            if "stream" not in answer:
                record({"from": spec, "place": place, "way": "file", **answer})

    def load(spec: str) -> None:
        for source, place in itertools.product(kernels.specs, places):
            given = saved[source, place]
            if "stream" not in given:
                continue
            answer = _call(
                kernels,
                spec,
                "harness.storm.calls:arrive_at",
                stream=given["stream"],
            )
            head = {"from": source, "to": spec, "place": place, "way": "file"}
            record({**head, "not_given": given["notes"], **answer})

    def record(row: Row) -> None:
        row = _explained(kernels, row)
        with lock:
            rows.append(row)
            tell(row)

    with ThreadPoolExecutor(_WORKERS) as pool:
        for work in (save, load):
            list(pool.map(work, kernels.specs))
    kernels.settle()
    order = {spec: number for number, spec in enumerate(kernels.specs)}
    return sorted(rows, key=lambda row: (places.index(row["place"]), order[row["from"]],
                                         order.get(row.get("to", ""), -1)))  # fmt: skip


def live(
    kernels: Kernels,
    places: Sequence[str],
    tell: Tell,
    link: LinkShape | None = None,
    ways: Sequence[tuple[str, str]] | None = None,
) -> list[Row]:
    """Send every place live from every kernel to every other one; return a row for each.

    `ways` are those that are taken instead. With `link`, what the two say to each other goes over a
    TCP connection shaped like that.
    """
    rows = []
    with nullcontext() if link is None else wire(link) as between:
        for place, (source, target) in itertools.product(
            places, ways or list(itertools.permutations(kernels.specs, 2))
        ):
            row = {"from": source, "to": target, "place": place, "way": "live"}
            row = _explained(kernels, row | _one_live(kernels, source, target, place, between))
            rows.append(row)
            tell(row)
    return rows


def _explained(kernels: Kernels, row: Row) -> Row:
    """Return a row with the id of the known issue for which it differs, if there is one."""
    issue = kernels.issue(row) if row["verdict"] == "differs" else None
    return row if issue is None else {**row, "issue": issue.id}


def _one_live(kernels: Kernels, source: str, target: str, place: str, between: Wire | None) -> Row:
    ends = {source: kernels.session(source), target: kernels.session(target)}
    with _relaying(between, ends[source], ends[target]) as (from_source, from_target):
        return _hand_over(kernels, source, target, place, from_source, from_target)


@contextmanager
def _relaying(
    between: Wire | None, source: Session, target: Session
) -> Iterator[tuple[Callable[[Event], None], Callable[[Event], None]]]:
    """Give two functions that pass on what the source, and what the target, gives out."""

    def put(to: Session) -> Callable[[str], None]:
        return lambda line: to.send_input(line + "\n")

    def passing_on(take: Callable[[str], None]) -> Callable[[Event], None]:
        def pass_on(event: Event) -> None:
            if event["event"] == "emit" and event["kind"] == EVENT:
                take(event["data"]["data"])

        return pass_on

    if between is None:
        yield passing_on(put(target)), passing_on(put(source))
        return
    with Relay(between, put(source), put(target)) as relay:
        yield passing_on(relay.from_one), passing_on(relay.from_other)


def _hand_over(
    kernels: Kernels,
    source: str,
    target: str,
    place: str,
    from_source: Callable[[Event], None],
    from_target: Callable[[Event], None],
) -> Row:
    def send() -> Any:
        return _answer(
            kernels.session(source).converse(
                "harness.storm.calls:send_live",
                timeout_s=SAVE_S,
                on_event=from_source,
                place=place,
            )
        )

    def receive() -> Any:
        return _answer(
            kernels.session(target).converse(
                "harness.storm.calls:receive_live",
                timeout_s=SAVE_S,
                on_event=from_target,
            )
        )

    with ThreadPoolExecutor(2) as pool:
        receiving, sending = pool.submit(receive), pool.submit(send)
        try:
            got, sent = receiving.result(), sending.result()
        except NsvmError as e:
            # What of the two is lost is found out by the next call; both are replaced.
            for spec in (source, target):
                kernels.restart(spec)
            return {"verdict": "host lost" if isinstance(e, HostLost) else "error", "why": str(e)}
    if "notes" not in sent:
        # A refusal is the destination's; of any other failure the source knows more.
        return dict(got if got.get("verdict") == "refused" else sent)
    given = {name: sent[name] for name in ("downtime_s", "size_bytes")}
    return {**got, **given, "not_given": sent["notes"]}


def _call(kernels: Kernels, spec: str, target: str, **arguments: Any) -> Row:
    try:
        return _answer(kernels.session(spec).call(target, timeout_s=SAVE_S, **arguments))
    except HostLost as e:
        kernels.restart(spec)
        return {"verdict": "host lost", "why": str(e)}


def _answer(result: CallResult) -> Row:
    said = splats(event["text"] for event in result.kmsg)
    row: Row = {"kernel_log": said} if said else {}
    if result.outcome == "return":
        row = {**result.value, **row}
        if said and row.get("verdict") == "works":
            row |= {"verdict": "differs", "why": f"the kernel says: {said[0]}"}
        return row
    bases = result.error.get("bases", ())
    why = result.error.get("message") or f"the call ended by {result.outcome}"
    verdict = next((said for name, said in _VERDICTS.items() if name in bases), "error")
    return {**row, "verdict": verdict, "why": why}


def verdicts(rows: Sequence[Row]) -> Iterator[tuple[str, int]]:
    """Yield every verdict with how often it was given."""
    for verdict in dict.fromkeys(row["verdict"] for row in rows):
        yield verdict, sum(row["verdict"] == verdict for row in rows)
