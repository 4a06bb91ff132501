"""How the hits of a search are printed: a table for people, other formats for programs."""

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from mmalign.cli import thumbs
from mmalign.cli.local import local_file
from mmalign.cli.options import print_values, show
from mmalign.terminal import columns, openable, printable, shorten, width

if TYPE_CHECKING:
    from mmalign.search.query import Query
    from mmalign.search.searcher import Hits
    from mmalign.search.snapshot import Hit

FORMATS = {
    "table": "Print a table, as on a terminal.",
    "tsv": "Print tab-separated values, as into a file or another program.",
    "csv": "Print comma-separated values.",
    "json": "Print one JSON object.",
    "jsonl": "Print one JSON object for each hit.",
    "paths0": "Print the paths of local files, each with a NUL character behind it.",
}
# Columns of TSV and CSV. Programs rely on them: new ones are added at the end.
COLUMNS = (
    "rank", "id", "score", "level", "relevance", "uri", "caption", "position", "words", "found_by",
    "store", "like",
)  # fmt: skip
# A hit's path is cut only if no system could open it; its text gets the rest of the line.
MAX_PLACE, MIN_WORDS = 4096, 20
# Between a picture and its hit.
GAP = "  "
LINE_BREAKS_AND_TABS = re.compile("([\t\n\r])")


def format_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add a flag for each format; `chosen` reads them."""
    for name, told in reversed(FORMATS.items()):
        command = click.option(f"--{name}", is_flag=True, help=told)(command)
    return command


def chosen(flags: Mapping[str, bool]) -> str:
    """Return the format of the one flag that is set; by default that which suits stdout.

    Raises:
        click.UsageError: Several are set.
    """
    given = [name for name in FORMATS if flags[name]]
    if len(given) > 1:
        names = " and ".join(f"--{name}" for name in given)
        raise click.UsageError(f"{names} are different formats: give one of them")
    return given[0] if given else "table" if sys.stdout.isatty() else "tsv"


def pictures(form: str, wanted: str) -> str | None:
    """Return how the pictures of hits are shown, see `thumbs.way`; None if they are not."""
    how = thumbs.way(wanted) if form == "table" else None
    fits = how and columns() >= thumbs.SIZES[how].columns + len(GAP) + MIN_WORDS
    return how if fits else None


def print_hits(form: str, hits: "Hits", read_as: dict[str, Any], how: str | None = None) -> None:
    """Print hits in any format but "json"; say how the query was read if that is not plain.

    Args:
        form: The format.
        hits: The hits, with their thumbnails if these are shown.
        read_as: How the query was read.
        how: How thumbnails are shown in a table, see `pictures`.
    """
    from mmalign.progress import say

    if not _is_plain(read_as):
        say(f"read as: {printable(read_as['text'])}")
    if how:
        _print_pictures(hits, how)
        return
    {
        "table": _print_table,
        "tsv": _print_tsv,
        "csv": _print_csv,
        "jsonl": _print_jsonl,
        "paths0": _print_paths,
    }[form](hits)


def json_fields(hit: "Hit") -> dict[str, Any]:
    """Return what JSON says of a hit."""
    return {k: v for k, v in asdict(hit).items() if k != "row" and v is not None}


def _print_table(hits: "Hits") -> None:
    for hit in hits:
        show(_line(_start(hit, hits.query), openable(hit.uri), _words(hit)))


def _print_pictures(hits: "Hits", how: str) -> None:
    """Print each hit in several lines beside its picture."""
    size = thumbs.SIZES[how]
    room = columns() - size.columns - len(GAP)
    for number, hit in enumerate(hits):
        place = shorten(printable(openable(hit.uri)), MAX_PLACE)
        words = shorten(printable(_words(hit)), room)
        texts = [_start(hit, hits.query), *([words] if words else [])]
        if width(place) > room:  # it goes on in the line below the picture
            texts += [""] * (size.rows - 1 - len(texts))
        texts += [place] + [""] * (size.rows - 1 - len(texts))
        if number:
            click.echo()
        for picture, text in zip(thumbs.lines(how, hit.thumbnail or b""), texts, strict=True):
            # As it is: without a terminal, click would take out the colours that were asked for.
            click.echo(f"{picture}{GAP}{text}".rstrip(" "), color=True)


def _start(hit: "Hit", query: "Query") -> str:
    """Return rank and score of a hit, and what is known of it beside these."""
    score = f"{hit.score:.3f}" if query.is_ranked else "-    "
    level = f"  {hit.level:<8}" if hit.level else ""
    by_words = "  words" if hit.words else ""
    alike = f"  +{len(hit.like)} alike" if hit.like else ""
    return f"{hit.rank:>3}  {score}{level}{by_words}{alike}"


def _words(hit: "Hit") -> str:
    return hit.caption or (hit.captions[0] if hit.captions else "")


def _print_tsv(hits: "Hits") -> None:
    for cells in (COLUMNS, *_rows(hits)):
        click.echo("\t".join(map(_escaped, cells)))


def _print_csv(hits: "Hits") -> None:
    text = io.StringIO()
    csv.writer(text).writerows([COLUMNS, *(map(_without_controls, row) for row in _rows(hits))])
    # Written as bytes: UTF-8 and these line ends, whatever the system has.
    click.echo(text.getvalue().encode(), nl=False)


def _print_jsonl(hits: "Hits") -> None:
    for hit in hits:
        print_values(json_fields(hit), as_json=True)


def _print_paths(hits: "Hits") -> None:
    from mmalign.progress import say

    found = [local_file(hit.uri) for hit in hits]
    for path in filter(None, found):
        click.echo(path + b"\0", nl=False)
    if left := found.count(None):
        kinds = "URLs, members of archives, rows of tables, or files that are gone"
        say(f"{left} of {len(found)} hits left out, which are no files here: {kinds}")


def _rows(hits: "Hits") -> Iterator[list[str]]:
    """Yield the cells of each hit; empty where there is no value."""
    for hit in hits:
        values = {
            **vars(hit),
            "score": hit.score if hits.query.is_ranked else None,
            "caption": next(iter(hit.captions), None) if hit.caption is None else hit.caption,
            "position": None if hit.position is None else list(hit.position),
            "like": json.dumps(hit.like, ensure_ascii=False) if hit.like else None,
        }
        yield ["" if values[name] is None else str(values[name]) for name in COLUMNS]


def _escaped(cell: str) -> str:
    r"""Escape as Python does: backslashes, control characters, and what stdout cannot print.

    >>> _escaped("a\tb\\c")
    'a\\tb\\\\c'
    """
    encoding = sys.stdout.encoding or "ascii"
    text = printable(cell.replace("\\", "\\\\"))
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _without_controls(cell: str) -> str:
    r"""Escape what would act on a terminal, except line breaks and tabs, which CSV may contain.

    >>> _without_controls("a\n\x1b[31m")
    'a\n\\x1b[31m'
    """
    parts = LINE_BREAKS_AND_TABS.split(cell)
    return "".join(p if p in ("\t", "\n", "\r") else printable(p) for p in parts)


def _is_plain(read_as: dict[str, Any]) -> bool:
    """Return whether a query is one text or file, without weight, filter or phrase."""
    if not read_as["parts"]:  # examples alone
        return True
    (part, *others) = read_as["parts"]
    return (
        not others
        and part["kind"] in ("text", "file")
        and part["weight"] == 1
        and not part["excluded"]
    )


def _line(start: str, place: str, words: str) -> str:
    """Format a hit as one line: its full path, so that it can be opened, and text as it fits."""
    line = f"{start}  {shorten(printable(place), MAX_PLACE)}"
    room = max(MIN_WORDS, columns() - width(line) - 2)
    return f"{line}  {shorten(printable(words), room)}".rstrip()
