"""How the hits of a search are printed."""

from typing import TYPE_CHECKING, Any

from mmalign.cli.options import show
from mmalign.terminal import columns, openable, printable, shorten, width

if TYPE_CHECKING:
    from mmalign.search.searcher import Hits

# A hit's path is cut only if no system could open it; its text gets the rest of the line.
MAX_PLACE, MIN_WORDS = 4096, 20


def show_hits(hits: "Hits", read_as: dict[str, Any]) -> None:
    """Print the hits as a table, a line each; say how the query was read if that is not plain."""
    from mmalign.progress import say

    if not _is_plain(read_as):
        say(f"read as: {printable(read_as['text'])}")
    for hit in hits:
        words = hit.caption or (hit.captions[0] if hit.captions else "")
        score = f"{hit.score:.3f}" if hits.query.items else "-    "
        level = f"  {hit.level:<8}" if hit.level else ""
        by_words = "  words" if hit.words else ""
        show(_line(f"{hit.rank:>3}  {score}{level}{by_words}", openable(hit.uri), words))


def _is_plain(read_as: dict[str, Any]) -> bool:
    """Return whether a query is one text or file, without weight, filter or phrase."""
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
