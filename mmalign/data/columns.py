"""Find the table columns that hold the image, the captions and the id.

Names are compared ignoring case and spaces around and inside them, so that `Image Path` is
`image_path`.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmalign.data.samples import CAPTION_ALIASES, DEFAULT_CAPTION_KEY, captions_in
from mmalign.errors import DataError, nearest
from mmalign.progress import say

# fmt: off
IMAGE_COLUMNS = (
    "image", "image_path", "img", "img_path", "filepath", "file_path", "path", "file", "filename",
    "file_name", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "url", "image_url", "uri",
)
# fmt: on
ID_COLUMNS = ("id", "key", "__key__", "image_id")
# The number of names that a message shows, and the maximum length of each.
SHOWN, SHOWN_CHARACTERS = 30, 40
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class ReadOptions:
    """The user's options for the columns of a table."""

    caption_keys: Sequence[str] = (DEFAULT_CAPTION_KEY,)
    image_column: str | None = None
    messages_said: set[str] = field(default_factory=set, compare=False)

    def say_once(self, path: str, text: str) -> None:
        """Log a message about a table once, because it may apply to hundreds of them."""
        if text not in self.messages_said:
            self.messages_said.add(text)
            say(f"{path}: {text}")


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are read, by their content."""

    image: str | None
    id: str | None
    captions: dict[str, str]
    """The column for each caption key, or for one of the default key's aliases."""
    not_metadata: frozenset[str]
    """The columns that are not metadata."""

    def captions_of(self, row: dict[str, Any], options: ReadOptions) -> tuple[str, ...]:
        """Collect the captions of a row; see `samples.captions_in`."""
        values = {key: _caption(row.get(name)) for key, name in self.captions.items()}
        return captions_in(values, options.caption_keys)


def find_columns(
    names: Iterable[str],
    options: ReadOptions,
    may_be_image: Callable[[str], bool] = lambda name: True,
) -> Columns:
    """Choose columns by name.

    Args:
        names: The columns, or the keys of a JSON object.
        options: The columns that the user wants.
        may_be_image: Whether the values of a column can be images or their paths.
    """
    by_name = {name: name for name in names}
    for name in list(by_name):
        by_name.setdefault(normalised(name), name)

    def find(*wanted: str) -> str | None:
        return next((by_name[w] for w in wanted if w in by_name), None)

    if options.image_column is not None:
        image = find(options.image_column, normalised(options.image_column))
    else:
        candidates = (find(wanted) for wanted in IMAGE_COLUMNS)
        image = next((name for name in candidates if name and may_be_image(name)), None)
    captions: dict[str, str] = {}
    not_metadata = {image} if image else set()
    for key in options.caption_keys:
        aliases = CAPTION_ALIASES if key == DEFAULT_CAPTION_KEY else (key,)
        found = {alias: find(alias, normalised(alias)) for alias in aliases}
        found_aliases = {alias: name for alias, name in found.items() if name is not None}
        captions |= found_aliases
        # An alias that is not used because another one is preferred is also metadata.
        not_metadata |= set(list(found_aliases.values())[:1])
    id = find(*ID_COLUMNS)
    return Columns(image, id, captions, frozenset(not_metadata | ({id} if id else set())))


def normalised(name: str) -> str:
    """Return the normalised form of a name for comparison.

    >>> normalised(" Image Path")
    'image_path'
    """
    return "_".join(name.split()).casefold()


def no_image_column(path: str, names: Sequence[str], options: ReadOptions) -> DataError:
    """Create the error for a table without an image column."""
    if options.image_column is not None:
        wanted = f"no column is called {shown(options.image_column)!r}"
        return DataError(f"{path}: {wanted}: {nearest(options.image_column, map(shown, names))}")
    return DataError(
        f"{path}: no image column; the table has {listed(names) or 'no columns'}; "
        f"looked for {', '.join(IMAGE_COLUMNS)} (see --image-column)"
    )


def missing_keys(names: Sequence[str], options: ReadOptions) -> list[str]:
    """Suggest columns for each caption key that is missing; the default key is optional."""
    found = find_columns(names, options).captions
    return [
        f"no column is called {shown(key)!r}: {nearest(key, map(shown, names))}"
        for key in options.caption_keys
        if key != DEFAULT_CAPTION_KEY and key not in found
    ]


def listed(names: Sequence[str]) -> str:
    """Format column names for a message, limiting their number and length."""
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(shown, names[:SHOWN])) + rest


def shown(name: str) -> str:
    r"""Format a name for a message: truncated, and without terminal control characters.

    >>> shown("a\x1b" + "b" * 100)
    'a\\x1bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb…'
    """
    cut = name if len(name) <= SHOWN_CHARACTERS else name[:SHOWN_CHARACTERS] + "…"
    return escaped(cut)


def escaped(text: str) -> str:
    """Escape control characters as Python does."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _caption(value: Any) -> Any:
    """Convert a missing number to no caption, and text that was not UTF-8 to its bytes."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, str) and not value.isascii():
        try:
            return value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            return value
    return value
