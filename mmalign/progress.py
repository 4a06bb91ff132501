"""One look for every long step: a bar on stderr, with images per second and the time left.

What is said goes through the logger `mmalign` of Python's `logging`. Where that has no handler of
the caller's, it is given one for stderr with the first message; `setLevel(logging.WARNING)` on it
keeps warnings only, without bars, and `logging.CRITICAL` keeps nothing.
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


class _Stderr(logging.Handler):
    """Prints messages as they are, above the bars that are shown."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        from tqdm import tqdm

        # A terminal that is gone is no reason to stop.
        with contextlib.suppress(OSError):
            tqdm.write(record.getMessage(), file=sys.stderr)


def bar(
    label: str,
    total: int | None = None,
    unit: str = "images",
    form: str | None = None,
    *,
    shown: bool = True,
) -> Any:
    """Return a tqdm bar (use it as a context manager; `.update(n)`, `.set_postfix_str(text)`)."""
    from tqdm import tqdm

    # Where stderr is a file, a line every ten seconds is enough.
    pace = 0.2 if sys.stderr.isatty() else 10.0
    made = tqdm(
        total=total, desc=f"{label:<10}", unit=f" {unit}", mininterval=pace, file=sys.stderr,
        dynamic_ncols=True, bar_format=form, disable=not (shown and _heard(logging.INFO)),
    )  # fmt: skip
    _open.add(made)
    return made


def over(label: str, items: Iterable[T], total: int | None = None, unit: str = "") -> Iterator[T]:
    """Pass items on while the bar counts them."""
    with bar(label, total, unit) as progress:
        for item in items:
            yield item
            progress.update()


def close_bars() -> None:
    """End the lines of all bars, so that what is printed next begins a line."""
    for each in list(_open):
        with contextlib.suppress(OSError):
            each.close()


def say(message: str) -> None:
    """Print a line for a person on stderr; stdout belongs to results."""
    level = logging.WARNING if message.startswith("warning:") else logging.INFO
    if _heard(level):
        from mmalign.terminal import printable

        # Line ends are ours: tables have some.
        LOGGER.log(level, "%s", "\n".join(map(printable, message.split("\n"))))


def _heard(level: int) -> bool:
    """Say whether messages of a level are wanted."""
    if not LOGGER.handlers:
        LOGGER.addHandler(_Stderr())
        LOGGER.propagate = False
        if LOGGER.level == logging.NOTSET:
            LOGGER.setLevel(logging.INFO)
    return LOGGER.isEnabledFor(level)
