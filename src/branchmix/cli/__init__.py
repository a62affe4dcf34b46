"""The ``branchmix`` command: parse, call the library, print. Results go to stdout, everything else to stderr.

Commands live in files of their own and import what they need when they run, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys

import typer

from branchmix.cli.experts import add_expert_command, remove_expert_command
from branchmix.cli.generate import generate_command
from branchmix.cli.inspect import inspect_command
from branchmix.cli.upcycle import upcycle_command
from branchmix.errors import BranchMixError

app = typer.Typer(
    name="branchmix",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Merge specialised language models of one seed into a mixture of attention and FFN experts (BAM).",
)
app.command("upcycle")(upcycle_command)
app.command("inspect")(inspect_command)
app.command("generate")(generate_command)
app.command("add-expert")(add_expert_command)
app.command("remove-expert")(remove_expert_command)


def _version(value: bool) -> None:
    if value:
        from branchmix import __version__

        typer.echo(f"branchmix {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version.", callback=_version, is_eager=True),
) -> None:
    pass


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2, Ctrl-C is 130."""
    try:
        app()
    except BranchMixError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: nothing was left behind", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
