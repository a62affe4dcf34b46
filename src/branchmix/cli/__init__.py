"""The ``branchmix`` command: parse, call the library, print. Results go to stdout, everything else to stderr.

Each command has its own file and imports what it needs when it runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import errno
import sys

import typer

from branchmix.cli import (
    branch,
    calibrate,
    demo,
    experts,
    export,
    generate,
    inspect,
    push,
    routes,
    serve,
    study,
    train,
    upcycle,
)
from branchmix.cli import eval as evaluate
from branchmix.cli.scaling import scaling_app
from branchmix.errors import BranchMixError, short

app = typer.Typer(
    name="branchmix",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Merge models fine-tuned from the same base into one mixture of attention and FFN experts (BAM).",
)
app.command("train", epilog=train.EPILOG)(train.train_command)
app.command("branch", epilog=branch.EPILOG)(branch.branch_command)
app.command("upcycle", epilog=upcycle.EPILOG)(upcycle.upcycle_command)
app.command("calibrate", epilog=calibrate.EPILOG)(calibrate.calibrate_command)
app.command("eval", epilog=evaluate.EPILOG)(evaluate.eval_command)
app.command("routes", epilog=routes.EPILOG)(routes.routes_command)
app.command("demo", epilog=demo.EPILOG)(demo.demo_command)
app.command("study", epilog=study.STUDY_EPILOG)(study.study_command)
app.command("report", epilog=study.REPORT_EPILOG)(study.report_command)
app.add_typer(scaling_app, name="scaling")
app.command("inspect")(inspect.inspect_command)
app.command("generate", epilog=generate.EPILOG)(generate.generate_command)
app.command("add-expert", epilog=experts.ADD_EPILOG)(experts.add_expert_command)
app.command("remove-expert", epilog=experts.REMOVE_EPILOG)(experts.remove_expert_command)
app.command("export", epilog=export.EPILOG)(export.export_command)
app.command("push", epilog=push.EPILOG)(push.push_command)
app.command("serve", epilog=serve.EPILOG, context_settings=serve.CONTEXT)(serve.serve_command)

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
