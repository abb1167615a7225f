"""The command line: parsing and printing; the work is done elsewhere and imported when needed."""

import io
import os
import sys
import warnings

import typer

from loopscope.commands import (
    compare,
    figures,
    inspect,
    intervene,
    lens,
    orbit,
    params,
    probe,
    train,
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="See what happens inside recursive (looped, depth-recurrent) transformers.",
)
for command in (figures, compare, lens, probe, intervene, orbit, inspect, params, train):
    app.command()(command)


def main() -> None:
    """Entry point: errors of the user become one line on stderr and exit code 2."""
    code = _run()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # one of several processes: the threads of their group, torn down while others still
        # work, now and then abort a process that has done all it had to
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    sys.exit(code)


def _run() -> int:
    """Run the command; its exit code."""
    from loopscope.errors import InputError

    # idle OpenMP threads that spin slow everything down where cores are shared
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # terminals without Unicode
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        # without standalone mode click's own errors arrive here too
        return app(standalone_mode=False) or 0
    except InputError as error:
        message = str(error)
    except typer.Abort:
        message = "aborted"
    except OSError as error:
        message = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    except KeyboardInterrupt:
        resumes = sys.argv[1:2] not in (["inspect"], ["params"])
        print(f"interrupted{'; the same command goes on' if resumes else ''}", file=sys.stderr)
        return 130
    except Exception as error:
        # click's usage errors; typer brings its own click or uses the installed one
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()
        if type(error).__name__ == "NoArgsIsHelpError":
            print(message)
            return 2
        message += " `loopscope COMMAND --help` lists what there is."
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
