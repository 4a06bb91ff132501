"""How a command ends: one line for a mistake, a traceback for a bug, an exit code for each.

0    success
1    failure; also a search that found nothing, and a bug, which keeps its traceback
2    the arguments of the call are wrong
130  interrupted, by Ctrl-C or SIGTERM
"""

import contextlib
import difflib
import errno
import io
import os
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from types import FrameType
from typing import Any, NoReturn

import click

from mmalign.errors import MmalignError, nearest, one_line, reason_of
from mmalign.progress import close_bars
from mmalign.terminal import printable, shorten

INTERRUPTED = 130
BUG = (
    "This is a bug in mmalign, not a mistake of yours. Please report it with the lines above, the "
    "command, and the output of `mmalign --version`."
)
# System errors that only a bug can cause; all others concern a path, a disk or a network.
OURS = (errno.EBADF, errno.EFAULT, errno.EINVAL)
# A reason is printed in full, but a message must not be as long as the data.
MAX_MESSAGE, MAX_CALL = 2_000, 300


class Commands(click.Group):
    """Shows mmalign's errors as one line, and the nearest name for an unknown command."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of their use."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is called; suggest the nearest ones if there is none."""
        known = ctx.resilient_parsing or not args or args[0] in self.commands
        if not known and not args[0].startswith("-"):
            raise click.UsageError(
                f"no command is called {args[0]!r}: {nearest(args[0], self.commands)}", ctx
            )
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **words: Any) -> Any:
        """Run a command; wrong arguments are reported in one line too."""
        _any_encoding()
        _quiet()
        try:
            with _Terminated():
                code = super().main(*args, **{**words, "standalone_mode": False})
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.ctx.get_help() if error.ctx else "", err=True)
            code = 2
        except click.ClickException as error:
            # The shell may have expanded one pattern to thousands of arguments.
            told = shorten(error.format_message().rstrip("."), MAX_CALL)
            complain(f"{told}{_hint(error)}")
            code = error.exit_code
        except click.Abort as abort:
            # click takes an EOFError for Ctrl-D at a prompt; there is no prompt here.
            if isinstance(abort.__cause__, EOFError):
                abort.__cause__.add_note(BUG)
                raise abort.__cause__ from None
            code = INTERRUPTED
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        """Call a command; an error meant for the user becomes one line."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except MmalignError as error:
            _end(ctx, str(error), error.exit_code)
        except KeyboardInterrupt as error:
            _end(ctx, str(error) or "interrupted", INTERRUPTED)
        except Exception as error:
            close_bars()
            if _reader_left(error):
                ctx.exit(1)
            told = told_of(error)
            if told is None:
                error.add_note(BUG)
                raise
            _end(ctx, told, 1)


def complain(message: str) -> None:
    """Print the one line that a failing command ends with."""
    close_bars()
    line = printable(one_line(message))
    if len(line) > MAX_MESSAGE:
        line = f"{line[: MAX_MESSAGE // 2]} ... {line[-MAX_MESSAGE // 2 :]}"
    with contextlib.suppress(OSError):
        click.echo(f"mmalign: {line}", err=True)


def _reader_left(error: Exception) -> bool:
    """Return whether an error means that stdout was closed; if so, nothing more is printed there.

    Only click's `echo` prints; a pipe that broke elsewhere, e.g. in a network, is an error.
    """
    if not isinstance(error, BrokenPipeError):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if not frame.f_globals["__name__"].startswith("click."):
        return False
    # At exit, Python would complain about output that it could not write.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _end(ctx: click.Context, message: str, code: int) -> NoReturn:
    complain(message)
    ctx.exit(code)


def told_of(error: Exception) -> str | None:
    """Return the message of an error a user can fix (disk, network, memory); None for a bug."""
    if isinstance(error, io.UnsupportedOperation):
        return None
    if isinstance(error, OSError):
        if error.filename is None and error.errno in OURS:
            return None
        place = f"{os.fsdecode(error.filename)}: " if _is_name(error.filename) else ""
        if not place and error.errno in (errno.ENOSPC, errno.EDQUOT):
            place = (
                f"a disk is full, perhaps the one for temporary files ({tempfile.gettempdir()}): "
            )
        return place + reason_of(error)
    # The GPU error is torch's own; it is recognized by name, as torch may not be loaded.
    lacking = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if lacking or "DefaultCPUAllocator: " in str(error):
        return f"out of memory: {reason_of(error)}"
    return None


def _is_name(filename: object) -> bool:
    return isinstance(filename, str | bytes) and bool(filename)


def _hint(error: click.ClickException) -> str:
    """Suggest a correction for wrong arguments."""
    ctx = getattr(error, "ctx", None)
    if ctx is None:
        return ""
    named = {parameter.name for parameter in ctx.command.params}
    hint = f" (see {ctx.command_path} --help)"
    options = [o for parameter in ctx.command.params for o in parameter.opts]
    if (
        isinstance(error, click.NoSuchOption)
        and "query" in named
        and not difflib.get_close_matches(error.option_name, options, cutoff=0.75)
    ):
        return f"; put -- before a query that begins with a dash: -- {error.option_name}...{hint}"
    if "unexpected extra argument" in error.format_message() and "data" in named:
        return f"; put a pattern in quotes (--data '*.tar'), or repeat --data{hint}"
    return hint


def _any_encoding() -> None:
    """Replace characters that stdout cannot encode; stderr escapes them as Python does."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="backslashreplace")


def _quiet() -> None:
    """Hide warnings that a command-line user cannot act on; a program still sees them."""
    # mmalign enforces the pixel limit itself; Pillow warns at half of it.
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")
    warnings.filterwarnings("ignore", "The image decoding and encoding capabilities")


class _Terminated:
    """While a command runs, SIGTERM ends it like Ctrl-C does: files are left intact."""

    def __enter__(self) -> None:
        self.before: Any = None
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, _interrupt)

    def __exit__(self, *error: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt("terminated")
