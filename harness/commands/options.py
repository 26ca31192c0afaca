"""Options that several commands have: which host, and which kernel on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from harness.host.lab_file import parameter
from harness.runner.expression import ExpressionError, matcher
from harness.runner.hosts import HostChoice, host_name

F = TypeVar("F", bound=Callable[..., Any])


_LAB, _PARAMS = f"{__name__}.lab", f"{__name__}.params"


class HostName(click.ParamType[str]):
    """``auto``, ``local``, ``emulated``, or ``ssh:NAME``, a machine of the lab."""

    name = "[auto|local|emulated|ssh:NAME]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return it as it is, if it is one."""
        try:
            return host_name(str(value))
        except ValueError as e:
            self.fail(str(e), param, ctx)


def _keep_lab(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    ctx.meta[_LAB] = value


def _keep_params(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> None:
    try:
        ctx.meta[_PARAMS] = tuple(dict(map(parameter, value)).items())
    except ValueError as e:
        raise click.BadParameter(str(e), ctx, param) from None


def kernel_options(function: F) -> F:
    """Add --kernel and --modules; the command takes them as kernel, modules."""
    for option in (
        click.option(
            "--modules",
            type=click.Path(path_type=Path),
            help="With --kernel PATH: the tree of its modules (kernel/, or lib/modules/RELEASE).",
        ),
        click.option(
            "--kernel",
            metavar="SPEC",
            help="Kernel of the emulated host: a version prefix such as 5.10, 6.1, 6.12 or 7.3;"
            " 'running'; 6.1:VARIANT (nsvm kernel variants); or the path of a bzImage or vmlinux.",
        ),
    ):
        function = option(function)
    return function


def host_options(function: F) -> F:
    """Add --host, --kernel and --modules; the command takes them as host, kernel, modules.

    --lab and --param come along; `host_choice` knows of them.
    """
    for option in (
        kernel_options,
        click.option(
            "--param",
            "params",
            multiple=True,
            metavar="NAME=VALUE",
            expose_value=False,
            callback=_keep_params,
            help="A parameter of kvm_amd, such as npt=0; given back afterwards. Repeatable.",
        ),
        click.option(
            "--lab",
            type=click.Path(path_type=Path),
            metavar="FILE",
            expose_value=False,
            callback=_keep_lab,
            help="What describes the lab machines. Default: $NSVM_LAB, else lab.toml.",
        ),
        click.option(
            "--host",
            type=HostName(),
            default="auto",
            show_default=True,
            help="auto: this machine's /dev/kvm if it has nested SVM, else the emulated host.",
        ),
    ):
        function = option(function)
    return function


def host_choice(host: str, kernel: str | None, modules: Path | None) -> HostChoice:
    """Return what `host_options` collected."""
    if modules is not None and kernel is None:
        raise click.UsageError("--modules goes with --kernel PATH")
    context = click.get_current_context(silent=True)
    meta = context.meta if context else {}
    return HostChoice(host, kernel, modules, meta.get(_LAB), meta.get(_PARAMS, ()))


def expression_option(chosen: str = "cases") -> Callable[[F], F]:
    """Add -k EXPR, which can be read; the command takes it as expression."""
    return click.option(
        "-k", "expression", default="", metavar="EXPR", callback=_readable,
        help=f"Only {chosen} that match, by pytest's rules.",
    )  # fmt: skip


def _readable(ctx: click.Context, param: click.Parameter, value: str) -> str:
    try:
        matcher(value)
    except ExpressionError as e:
        raise click.BadParameter(str(e), ctx, param) from None
    return value
