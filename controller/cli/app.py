"""`whimbrel`: the operator's commands, collected. Each group of commands is a file beside this one."""

from __future__ import annotations

from typing import Annotated

import typer

from whimbrel import __version__
from whimbrel.controller.cli import observe, operate, react, serve

_EXIT_CODES = """
Exit codes: 0 done · 1 tried and failed, or aborted · 2 wrong command line · 3 refused before anything was
touched · 4 bus unreachable · 5 no such workload, host or migration · 6 stopped waiting · 130 Ctrl-C
"""

app = typer.Typer(
    name="whimbrel",
    help="Move a running Linux service to another host while its users keep using it.",
    epilog=_EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(operate.app)
app.add_typer(observe.app)
app.add_typer(serve.app)
app.add_typer(react.app)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"whimbrel {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Version.")
    ] = False,
) -> None:
    pass
