"""One look for every long step: a bar on stderr, with images per second and the time left."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


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
    return tqdm(
        total=total, desc=f"{label:<10}", unit=f" {unit}", mininterval=pace, file=sys.stderr,
        dynamic_ncols=True, bar_format=form, disable=not shown,
    )  # fmt: skip


def over(label: str, items: Iterable[T], total: int | None = None, unit: str = "") -> Iterator[T]:
    """Pass items on while the bar counts them."""
    with bar(label, total, unit) as progress:
        for item in items:
            yield item
            progress.update()


def say(message: str) -> None:
    """Print a line for a person on stderr; stdout belongs to results."""
    from tqdm import tqdm

    tqdm.write(message, file=sys.stderr)
