"""The ``branchmix`` command: parse, call the library, print. Results go to stdout, everything else to stderr.

Each command has its own file and imports what it needs when it runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import errno
import sys

import typer

from branchmix.cli import evaluate, merging, models, scaling, serve, study, training, trends  # noqa: F401
from branchmix.cli.console import app
from branchmix.errors import BranchMixError, short

_IN_ORDER = (
    "train branch upcycle calibrate eval routes demo study report inspect generate add-expert remove-expert "
    "export push serve"
).split()
"""How ``--help`` lists the commands."""
app.registered_commands.sort(key=lambda command: _IN_ORDER.index(command.name or ""))

_INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it; newer typer returns it, older ones raise."""


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
    """Run the command line. A user's mistake gives one line on stderr and exit code 2; Ctrl-C gives 130."""
    try:
        code = app(standalone_mode=False)
    except BranchMixError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP) or error.filename is None:
            raise
        print(f"error: {short(str(error.filename))}: {error.strerror}: choose another name", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        _show_usage_error(error)
        sys.exit(2)
    if code == _INTERRUPTED:
        print("interrupted: nothing was left behind", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _show_usage_error(error: Exception) -> None:
    """Print a wrong option or argument as one line; newer versions of typer raise copies of click's classes."""
    context = getattr(error, "ctx", None)
    if not hasattr(error, "format_message"):
        raise error
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
        return
    command = context.command_path if context is not None else "branchmix"
    message = " ".join(error.format_message().split()).removesuffix(".")
    print(f"error: {message}: see `{command} --help`", file=sys.stderr)
