"""The command line: one file a command; here the app, and how errors become lines and exit codes.

Exit codes: 0 done, 1 failed, 2 misuse, 130 interrupted. Results go to stdout, the rest to stderr.
Whatever takes long to import is imported inside the functions that use it, so that help is instant.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from chordal import __version__
from chordal.cli import bench as bench
from chordal.cli import bench_serve as bench_serve
from chordal.cli import compare as compare
from chordal.cli import convert as convert
from chordal.cli import generate as generate
from chordal.cli import inspect as inspect
from chordal.cli import listing as listing
from chordal.cli import plan as plan
from chordal.cli import serve as serve
from chordal.cli import trace as trace
from chordal.cli import train as train
from chordal.cli import tune as tune
from chordal.cli import verify as verify
from chordal.errors import ChordalError, InputError

# Typer carries its own copy of click, so its errors are reached through what it exports.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]

_EXAMPLES = """\b
Examples:
  chordal generate "reverse: Ana Ben Cleo Dan"
  chordal compare --demo
"""

app = typer.Typer(
    name="chordal",
    help="Several tokens per forward pass, for autoregressive and diffusion language models.",
    epilog=_EXAMPLES,
    invoke_without_command=True,
    add_completion=False,
    # Rich help takes three times as long to draw.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["--help", "-h"],
        # The ecosystem is split over --max-new-tokens and --max_new_tokens: take both.
        "token_normalize_func": lambda name: name.replace("_", "-"),
    },
)
app.command("generate", epilog=generate.EXAMPLES)(generate.generate)
app.command("compare", epilog=compare.EXAMPLES)(compare.compare)
app.command("inspect", epilog=inspect.EXAMPLES)(inspect.inspect)
app.command("convert", epilog=convert.EXAMPLES)(convert.convert)
app.command("list", epilog=listing.EXAMPLES)(listing.list_)
app.command("plan", epilog=plan.EXAMPLES)(plan.plan)
app.command("serve", epilog=serve.EXAMPLES)(serve.serve)
app.command("trace", epilog=trace.EXAMPLES)(trace.trace)
app.command("train", epilog=train.EXAMPLES)(train.train)
app.command("tune", epilog=tune.EXAMPLES)(tune.tune)
app.command("verify", epilog=verify.EXAMPLES)(verify.verify)

_bench = typer.Typer(rich_markup_mode=None)
_bench.callback(invoke_without_command=True, epilog=bench.EXAMPLES)(bench.bench)
_bench.command("serve", epilog=bench_serve.EXAMPLES)(bench_serve.serve)
app.add_typer(_bench, name="bench")


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"chordal {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(args: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: What follows the program's name; None takes it from `sys.argv`.

    Returns:
        The exit code.
    """
    given = sys.argv[1:] if args is None else args
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows its number instead of failing.
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    try:
        code = typer.main.get_command(app).main(
            args=given, prog_name="chordal", standalone_mode=False, obj=given
        )
        sys.stdout.flush()
        return code or 0
    except (InputError, _UsageError) as error:
        _report(getattr(error, "format_message", error.__str__)())
        print(f"Try: {_command_path(given)} --help", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        # Whoever read our output has had enough; what is left in the buffer has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ChordalError as error:
        _report(str(error))
        return 1
    except Exception as error:
        _report(f"{type(error).__name__}: {error} (CHORDAL_DEBUG=1 shows where)")
        return 1


def _command_path(given: list[str]) -> str:
    """Name the command that was called, as far as there is one."""
    path, command = "chordal", typer.main.get_command(app)
    for word in given:
        if (inner := getattr(command, "commands", {}).get(word)) is None:
            break
        path, command = f"{path} {word}", inner
    return path


def _report(message: str) -> None:
    if os.environ.get("CHORDAL_DEBUG"):
        traceback.print_exc()
    print("Error:", " ".join(message.split()), file=sys.stderr)
