"""The `search` command: read the query, open the stores, search, print the hits."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from mmalign import files
from mmalign.cli import thumbs as thumbnails
from mmalign.cli.hits import chosen, format_options, json_fields, pictures, print_hits
from mmalign.cli.local import open_files
from mmalign.cli.options import PLACE, TEXT, FolderPath, print_values, where_option
from mmalign.cli.startup import quick_imports
from mmalign.errors import DataError, UsageError

if TYPE_CHECKING:
    from mmalign.search.query import Query
    from mmalign.search.searcher import Hits, Searcher
    from mmalign.search.several import MultiSearcher
    from mmalign.search.sheet import Tile
    from mmalign.search.snapshot import Hit
    from mmalign.store import Store

# Prefixes of queries that may mean a file; whether the file exists is checked on disk.
PATH_STARTS = ("./", "../", "/", "~/", ".\\", "..\\", "file://", "http://", "https://")


@click.command()
@click.argument(
    "stores", nargs=-1, metavar="STORE [STORE]...", type=FolderPath(),
    shell_complete=PLACE.shell_complete,  # the last one may be an image
)  # fmt: skip
@click.argument("query")
@click.option(
    "--more", multiple=True, metavar="ID", type=TEXT,
    help="More like this row; may be given several times, and without QUERY.",
)  # fmt: skip
@click.option(
    "--less", multiple=True, metavar="ID", type=TEXT,
    help="Less like this row; may be given several times.",
)  # fmt: skip
@click.option("-k", default=10, show_default=True, help="Number of results.")
@click.option("--offset", default=0, show_default=True, help="Results to skip at the start.")
@click.option(
    "--to", metavar="MODALITY", type=TEXT,
    help="What to search: image (the default), text for the captions, or what else the store has.",
)  # fmt: skip
@where_option
@click.option("--exact", is_flag=True, help="Compare every row, even if there is an index.")
@click.option(
    "--lexical", is_flag=True, help="Also find captions that have words of the query, by rank."
)
@click.option(
    "--diversity", default=0.0, show_default=True, metavar="0..1",
    help="From the nearest (0) to rows that are as unlike each other as may be (1).",
)  # fmt: skip
@click.option(
    "--group/--no-group", default=None,
    help="Show near-duplicates as one hit; the default for the table.",
)  # fmt: skip
@click.option("--open", "opens", is_flag=True, help="Open the image files of the hits, at most 10.")
@click.option(
    "--thumbs", type=click.Choice(thumbnails.WAYS), default="auto", show_default=True,
    help="Pictures in the table: as kitty shows them, of blocks, or where they are sharp (auto).",
)  # fmt: skip
@click.option("--sheet", metavar="FILE.png", type=PLACE, help="Draw the hits as a contact sheet.")
@click.option(
    "--model", metavar="RUN_OR_NAME", type=PLACE,
    help="The model, if it was moved since embedding; for a folder, the model to embed with.",
)  # fmt: skip
@click.option("--here", is_flag=True, help="Keep the store of a folder in it, hidden.")
@click.option(
    "--yes", is_flag=True,
    help="For a folder: download the default model, and drop many rows, without a question.",
)  # fmt: skip
@format_options
def search(
    *,
    stores: tuple[Path, ...],
    query: str,
    more: tuple[str, ...],
    less: tuple[str, ...],
    k: int,
    offset: int,
    to: Any,
    where: str | None,
    exact: bool,
    lexical: bool,
    diversity: float,
    group: bool | None,
    opens: bool,
    thumbs: str,
    sheet: str | None,
    model: str | None,
    here: bool,
    yes: bool,
    **formats: bool,
) -> None:
    """Find the images of a store nearest to a text or an image.

    The last argument is the query, those before it are stores of one model. QUERY is an image if a
    file with this name exists. Anything else is text, in which operators between spaces count: +
    adds, - subtracts, ! excludes, and 2: in front is a weight. @cat.jpg is an image, row:ID a row
    of the store; "words in quotes" must occur in a caption; FIELD:VALUE, FIELD:>3 and FIELD:2..5
    filter by metadata. Put -- before a text that begins with a dash.

    A folder of images may stand in the place of a store. Its new and changed images are embedded
    first, into a store that is kept in your cache folder, or with --here in the folder.

    --more and --less turn the query by rows that you name, as hits of a search before, and leave
    these rows out. With --more the query may be left out.

    If an index was built, hits of a text are likely, maybe or unlikely what was asked for; the exit
    code is 1 if all are unlikely, or there is none.

    Hits are a table on a terminal, and tab-separated values with a header anywhere else.

    \b
    Example:  mmalign search photos/ "a dog on a beach" --model run
              mmalign search photos.store "a dog on a beach"
              mmalign search photos.store "沙滩上的狗" -k 5 --sheet hits.png
              mmalign search photos.store cat.jpg --to text
              mmalign search photos.store "@cat.jpg + snow - 0.5:grass"
              mmalign search photos.store "dress ! stripes price:<20"
              mmalign search photos.store scans.store "Prof. Zorvex" --lexical
              mmalign search photos.store "dress" --more photos/cat.jpg --less photos/dog.jpg
              mmalign search photos.store "red" --where "label = 'dress' and price < 20"
              mmalign search photos.store "red" -k 100 --csv
    """
    import time

    with quick_imports():
        from mmalign.search.several import MultiSearcher

    stores, typed = _stores_and_words(stores, query, is_feedback=bool(more or less))
    form = chosen(formats)
    if sheet:
        from mmalign.search.sheet import Strip, check_sheet, draw_sheet

        check_sheet(Path(sheet))
    opened = _opened(stores, model, here=here, yes=yes)
    asked = _query(typed, {name: None for store in opened for name in store.fields}, more, less)
    read_as = asked.read_as
    asked = _with_images(asked, typed)
    searcher = _searcher(opened, model)
    group = (asked.is_ranked and form == "table") if group is None else group
    how = pictures(form, thumbs)
    started = time.perf_counter()
    hits = searcher.search(
        asked, k, to=to, offset=offset, exact=exact, where=where, lexical=lexical,
        diversity=diversity, group=group, thumbnails=how is not None,
    )  # fmt: skip
    took_ms = (time.perf_counter() - started) * 1e3
    if sheet:
        picture = _only_picture(asked)
        draw_sheet([Strip(typed, _tiles(opened, hits), picture)], Path(sheet))
    if form == "json":
        index = {} if isinstance(searcher, MultiSearcher) else {"index": searcher.describe_index()}
        answer = _answer(hits, typed, read_as) | index | {"took_ms": round(took_ms, 3)}
        print_values(answer, as_json=True)
    else:
        print_hits(form, hits, read_as, how)
    if hits.nothing_found:
        _end_without_a_find(hits)
    if opens:
        open_files(hits)


def _stores_and_words(
    stores: tuple[Path, ...], query: str, *, is_feedback: bool
) -> tuple[tuple[Path, ...], str]:
    """Tell the stores from the words; with examples of rows, the words may be left out."""
    if is_feedback and Path(query).is_dir():
        stores, query = (*stores, FolderPath().convert(query, None, None)), ""
    _refuse_loose_words(stores, query)
    return stores, query


def _searcher(stores: "Sequence[Store]", model: str | None) -> "Searcher | MultiSearcher":
    """Return what searches one store or several, with their model."""
    from mmalign.search.model import model_of
    from mmalign.search.searcher import Searcher
    from mmalign.search.several import MultiSearcher

    encoder = model_of(stores[0], model)
    return MultiSearcher(stores, encoder) if len(stores) > 1 else Searcher(stores[0], encoder)


def _refuse_loose_words(stores: Sequence[Path], typed: str) -> None:
    """Refuse a call without a store, or with a query whose words are arguments of their own."""
    if not stores:
        raise click.MissingParameter(param_hint="'QUERY'", param_type="argument")
    if len(stores) > 1 and not all(store.is_dir() for store in stores[1:]):
        words = " ".join([*map(str, stores[1:]), typed])
        told = f"put its words in quotes: {words!r}"
        raise UsageError(f"only the last argument is the query, and others are stores: {told}")


def _opened(places: Sequence[Path], model: str | None, *, here: bool, yes: bool) -> "list[Store]":
    """Open the stores; those of folders of images are brought up to date before."""
    from mmalign.cli.folder import is_plain_folder, up_to_date
    from mmalign.store import open_store

    return [
        open_store(
            up_to_date(place, model, here=here, yes=yes) if is_plain_folder(place) else place
        )
        for place in places
    ]


def _answer(hits: "Hits", typed: str, read_as: dict[str, Any]) -> dict[str, Any]:
    """Return what JSON says of a search."""
    return {
        "query": files.in_utf8(typed),
        "read_as": read_as,
        "hits": [json_fields(hit) for hit in hits],
        "nothing_found": hits.nothing_found,
    }


def _end_without_a_find(hits: "Hits") -> NoReturn:
    """Say that nothing was found, and why if that is known."""
    from mmalign.progress import say

    narrowed = any(vars(hits.query.selection).values())
    why = ": no row matches the filters" if narrowed else ""
    say(f"nothing found{': these are only the nearest' if hits else why}")
    click.get_current_context().exit(1)


def _only_picture(asked: "Query") -> bytes:
    """Return the picture that is all of a query; empty if it is another one."""
    pictures = [item for item, _ in asked.items if isinstance(item, bytes)]
    return pictures[0] if len(asked.items) == len(pictures) == 1 else b""


def _tiles(stores: "Sequence[Store]", hits: "Sequence[Hit]") -> "list[Tile]":
    """Make the tiles of hits, each from its store."""
    from mmalign.search.sheet import tiles_of

    held = {str(store.path): store for store in stores}
    return [t for hit in hits for t in tiles_of(held.get(hit.store or "", stores[0]), [hit])]


def _query(
    typed: str, fields: Iterable[str], more: Sequence[str] = (), less: Sequence[str] = ()
) -> "Query":
    """Read a query and its examples; without words, it is of examples alone."""
    from dataclasses import replace

    from mmalign.items import Row
    from mmalign.search.query import Query

    like, unlike = tuple(map(Row, more)), tuple(map(Row, less))
    if (more or less) and not typed.strip():
        return Query((), more=like, less=unlike)
    return replace(_typed_query(typed, fields), more=like, less=unlike)


def _typed_query(typed: str, fields: Iterable[str]) -> "Query":
    """Read a query: the name of a file, or the query language, where `@path` is a file.

    The name of an existing file is never searched as text, as nobody would notice; a name that
    matches no file is not refused, as it may be a text.
    """
    from mmalign.progress import say
    from mmalign.search.query import Query

    named = typed.startswith("@")
    file = Path(os.path.expanduser(typed[1:] if named else typed))
    is_file, is_other = _what_is(file)
    if is_file or (is_other and (named or not file.is_dir())):
        return Query(((file, 1.0),))
    # A space in front of @ keeps it a text, as messages say.
    asked = Query.parse(files.in_utf8(typed), fields=fields, files=not typed[:1].isspace())
    for item in (*(item for item, _ in asked.items), *asked.excluded):
        if isinstance(item, str) and (item.startswith(PATH_STARTS) or _ends_as_image(item)):
            told = "looks like a file name, but there is no such file: it is searched as text"
            say(f"{item!r} {told}")
    return asked


def _with_images(asked: "Query", typed: str) -> "Query":
    """Put the content of image files in the place of their paths.

    Images that cannot be decoded, and missing files, are refused before a model is loaded.
    """
    from dataclasses import replace

    def opened(item: Any) -> Any:
        return _content(item, typed) if isinstance(item, Path) else item

    items = tuple((opened(item), weight) for item, weight in asked.items)
    return replace(asked, items=items, excluded=tuple(map(opened, asked.excluded)))


def _content(named: Path, typed: str) -> bytes | Path:
    """Return the content of an image file; the path of a file of another modality."""
    from mmalign.modality import IMAGE, of_file

    file = Path(os.path.expanduser(named))
    is_file, is_other = _what_is(file)
    by_name = not typed.startswith("@") and Path(os.path.expanduser(typed)) == file
    if not is_file and by_name:
        raise UsageError(f"{file}: cannot be used as an image: not a regular file")
    if not is_file:
        reason = "not a regular file" if is_other else "no such image file"
        raise UsageError(
            f"{file}: {reason}; to search for text that begins with @, put a space before it"
        )
    if of_file(file.name) is not IMAGE:
        return file
    hint = f"; to search for this text, add a space at its end: '{typed} '"
    return _image(file, hint if by_name else "")


def _what_is(file: Path) -> tuple[bool, bool]:
    """Return whether there is a file of a name, and whether there is something else."""
    try:
        return file.is_file(), file.exists() and not file.is_file()
    except (OSError, ValueError):  # too long for a file name, or contains a NUL
        return False, False


def _ends_as_image(name: str) -> bool:
    from mmalign.data.kinds import PICTURE_SUFFIXES, suffix

    return suffix(name) in PICTURE_SUFFIXES


def _image(file: Path, hint: str) -> bytes:
    """Read a query image; refuse one that cannot be decoded before a model is loaded."""
    from mmalign.data import is_image_content, open_image

    try:
        with open(file, "rb") as opened:
            content = opened.read(64)
            if is_image_content(content) or _ends_as_image(file.name):
                content += opened.read()
        open_image(content, side=64)
    except (OSError, DataError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{file}: cannot be used as an image: {reason}{hint}") from None
    return content
