"""Options shared by several commands, and the printing of results."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from mmalign import files
from mmalign.terminal import printable

# Control characters that JSON leaves unescaped and a terminal may act on.
ACTIVE_IN_JSON = re.compile("[\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


# click's own class takes a type parameter only since 8.4.
if TYPE_CHECKING:
    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType


class _Text(ParamType):
    """A text; in UTF-8, as terminals write it, even if the locale does not say so."""

    name = "text"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        return files.in_utf8(str(value))


class _Place(ParamType):
    """A path or URL; expands `~` to the home folder, which a shell does only for a bare `~`."""

    name = "text"
    completed = "file"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        return os.path.expanduser(str(value))

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        """Leave it to the shell to complete a path."""
        return [CompletionItem(incomplete, type=self.completed)]


class FolderPath(_Place):
    """A folder."""

    name = "path"
    completed = "dir"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return a path."""
        return Path(super().convert(value, param, ctx))


PLACE, TEXT = _Place(), _Text()
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout."
)
model_option = click.option(
    "--model", required=True, metavar="RUN_OR_NAME", type=PLACE,
    help="A run folder, or an open_clip model: NAME:TAG, NAME:FILE, hf-hub:ORG/REPO or "
    "local-dir:FOLDER.",
)  # fmt: skip
store_argument = click.argument("store", type=FolderPath())
yes_option = click.option(
    "--yes", is_flag=True, help="Allow deleting more than a tenth of the rows."
)
where_option = click.option(
    "--where", "where", metavar="SQL", type=TEXT,
    help="Only rows for which this SQL is true; columns: id, uri, captions, meta and its fields.",
)  # fmt: skip


def column_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that name the columns of tables."""
    keys = click.option(
        "--caption-key", "caption_keys", multiple=True, metavar="KEY", type=TEXT,
        help="Caption field of the .json or table; repeatable. Default: captions.",
    )  # fmt: skip
    image = click.option(
        "--image-column", metavar="NAME", type=TEXT,
        help="Table column with images or their paths. Default: image, path, url, ...",
    )  # fmt: skip
    return keys(image(command))


def print_values(values: dict[str, Any], as_json: bool) -> None:
    """Print a result as one JSON object, or as readable lines."""
    if as_json:
        click.echo(_json(values))
        return
    flat = dict(_flatten(values))
    width = max(len(k) for k in flat)
    for key, value in flat.items():
        show(f"{key:<{width}}  {_number(value) if isinstance(value, float) else value}")


def _number(value: float) -> str:
    """Format a number so that its first digits are visible.

    >>> _number(0.9512345), _number(2e-5), _number(0.0), _number(1035971223.02)
    ('0.9512', '2.00e-05', '0.0000', '1035971223')
    """
    if abs(value) >= 1e6:
        return f"{value:.0f}"
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2e}"


def show(line: str) -> None:
    """Print one line of a result to stdout, with control characters in it escaped."""
    click.echo(printable(line))


def _json(values: dict[str, Any]) -> str:
    """Write readable Unicode JSON if stdout can print it, else ASCII."""
    text = json.dumps(values, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return json.dumps(values)
    return ACTIVE_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Flatten nested dicts to dotted names."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        elif not isinstance(value, list):
            yield prefix + key, value
