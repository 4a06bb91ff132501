"""Messages and progress bars.

Messages go to the logger `mmalign` of Python's `logging`, as in any library: a program sees
warnings, and more if it configures logging. Progress bars are not shown. The command line calls
`to_stderr`, as a program may: messages and bars then appear on stderr. `setLevel(logging.WARNING)`
on the logger hides bars and keeps warnings, `logging.CRITICAL` hides everything.
"""

import contextlib
import logging
import sys
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

LOGGER = logging.getLogger("mmalign")
_open: "weakref.WeakSet[Any]" = weakref.WeakSet()
_state = {"bars": False}


def to_stderr() -> None:
    """Show messages and progress bars on stderr."""
    _state["bars"] = True
    if not any(isinstance(handler, _Stderr) for handler in LOGGER.handlers):
        LOGGER.addHandler(_Stderr())
    LOGGER.propagate = False
    if LOGGER.level == logging.NOTSET:
        LOGGER.setLevel(logging.INFO)


class _Stderr(logging.Handler):
    """Prints messages unchanged, above the visible bars."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        from tqdm import tqdm

        # A closed terminal is no reason to stop.
        with contextlib.suppress(OSError):
            tqdm.write(record.getMessage(), file=sys.stderr)


def bar(
    label: str,
    total: int | None = None,
    unit: str = "images",
    form: str | None = None,
    *,
    shown: bool | None = None,
) -> Any:
    """Return a tqdm bar (use it as a context manager; `.update(n)`, `.set_postfix_str(text)`).

    It is visible if `shown` is true or, if that is None, if bars are shown on stderr.
    """
    from tqdm import tqdm

    # If stderr is a file, one line every ten seconds is enough.
    pace = 0.2 if sys.stderr.isatty() else 10.0
    made = tqdm(
        total=total, desc=f"{label:<10}", unit=f" {unit}", mininterval=pace, file=sys.stderr,
        dynamic_ncols=True, bar_format=form,
        disable=not (_shows_bars() if shown is None else shown),
    )  # fmt: skip
    _open.add(made)
    return made


def over(label: str, items: Iterable[T], total: int | None = None, unit: str = "") -> Iterator[T]:
    """Yield the items while a bar counts them."""
    with bar(label, total, unit) as progress:
        for item in items:
            yield item
            progress.update()


def close_bars() -> None:
    """Close all bars, so that the next output starts on a new line."""
    for each in list(_open):
        with contextlib.suppress(OSError):
            each.close()


def say(message: str) -> None:
    """Log a message for the user; one that begins with "warning:" is a warning."""
    level = logging.WARNING if message.startswith("warning:") else logging.INFO
    if LOGGER.isEnabledFor(level):
        from mmalign.terminal import printable

        # Line breaks are intended, as in tables, so they are kept.
        LOGGER.log(level, "%s", "\n".join(map(printable, message.split("\n"))))


@contextlib.contextmanager
def only_news(told: set[str]) -> Iterator[None]:
    """Hide the bars and messages of a block, except for warnings that are not in `told`.

    Afterwards `told` holds the warnings of this block, so what lasts is said once.
    """
    now: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        now.add(message)
        return message not in told

    level = LOGGER.level
    LOGGER.setLevel(max(level, logging.WARNING))
    LOGGER.addFilter(is_new)
    try:
        yield
    finally:
        LOGGER.removeFilter(is_new)
        LOGGER.setLevel(level)
        told.clear()
        told.update(now)


def _shows_bars() -> bool:
    return _state["bars"] and LOGGER.isEnabledFor(logging.INFO)
