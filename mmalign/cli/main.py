"""The `mmalign` command: parse the arguments, call one function, print the result.

Only click and the error classes are loaded up front; each command imports what it needs. Results go
to stdout (`--json`: one object), everything else to stderr. `errors.py` has the exit codes.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmalign import __version__, files
from mmalign.cli import store as cli_store
from mmalign.cli.errors import Commands
from mmalign.cli.options import PLACE, TEXT, FolderPath, show
from mmalign.cli.options import json_option as _json
from mmalign.cli.options import model_option as _model
from mmalign.cli.options import print_values as _print
from mmalign.cli.options import store_argument as _store
from mmalign.cli.options import where_option as _where
from mmalign.errors import DataError, UsageError
from mmalign.progress import to_stderr
from mmalign.terminal import columns, openable, printable, shorten, width

if TYPE_CHECKING:
    from mmalign.search.query import Query
    from mmalign.search.searcher import Hits
    from mmalign.search.sheet import Tile
    from mmalign.search.snapshot import Hit
    from mmalign.store import Store

Command = Callable[..., Any]
# A hit's path is cut only if no system could open it; its text gets the rest of the line.
MAX_PLACE, MIN_WORDS = 4096, 20
# Prefixes of queries that may mean a file; whether the file exists is checked on disk.
PATH_STARTS = ("./", "../", "/", "~/", ".\\", "..\\", "file://", "http://", "https://")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mmalign")
def main() -> None:
    """Align images and text in one embedding space, store the embeddings, and search them.

    \b
    The path:  train -> embed -> index -> search
    Try it:    mmalign demo
    """
    to_stderr()


def _sources(required: bool = True) -> Callable[[Command], Command]:
    return click.option(
        "--data", "data", multiple=True, required=required, metavar="SRC", type=PLACE,
        help="Folder, .tar (braces and globs), .parquet, .csv, .tsv, .jsonl, or URL. Repeatable.",
    )  # fmt: skip


def _columns(command: Command) -> Command:
    """Add the options that name table columns."""
    keys = click.option(
        "--caption-key", "caption_keys", multiple=True, metavar="KEY", type=TEXT,
        help="Caption field of the .json or table; repeatable. Default: captions.",
    )  # fmt: skip
    image = click.option(
        "--image-column", metavar="NAME", type=TEXT,
        help="Table column with images or their paths. Default: image, path, url, ...",
    )  # fmt: skip
    return keys(image(command))


@main.command()
@click.option(
    "--out", default="demo", show_default=True, type=PLACE, help="Folder for all results."
)
@click.option("--scenes", default=12_000, show_default=True, help="Number of scenes to train on.")
@click.option("--minutes", default=4.0, show_default=True, help="Training time in minutes.")
def demo(out: str, scenes: int, minutes: float) -> None:
    """Draw scenes, train on them, and search them in two languages.

    Takes about five minutes on two cores; --out must be a new folder.

    \b
    Example:  mmalign demo --out demo
    """
    from mmalign.cli.demo import demo as run

    run(out, scenes=scenes, minutes=minutes)


@main.command()
@_sources(required=False)
@click.option(
    "--val",
    multiple=True,
    metavar="SRC",
    type=PLACE,
    help="Validation pairs; by default some training images are held out.",
)
@click.option("--out", required=True, metavar="RUN", type=PLACE, help="Folder for the run.")
@click.option("--config", metavar="FILE.toml", type=PLACE, help="Fields of TrainConfig as TOML.")
@click.option(
    "--preset", metavar="NAME",
    help="Train one of mmalign's own models from scratch: nano, tiny, small.",
)  # fmt: skip
@click.option("--model", metavar="NAME", help="An open_clip architecture.")
@click.option("--pretrained", metavar="TAG_OR_PATH", type=PLACE, help="Weights of --model.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE",
    help="Override one field of TrainConfig.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Resume the run in --out with the same data.")
@_columns
@_json
def train(
    *,
    data: tuple[str, ...],
    val: tuple[str, ...],
    out: str,
    config: str | None,
    settings: tuple[str, ...],
    resume: bool,
    caption_keys: tuple[str, ...],
    as_json: bool,
    **words: str | None,
) -> None:
    """Train a dual encoder on images and their captions.

    Starts from scratch (--preset) or from open_clip weights (--model and --pretrained).

    \b
    Example:  mmalign train --data photos/ --out run
              mmalign train --data 'pairs-{000..005}.tar' --val val.tar --out run
              mmalign train --data photos/ --out run --set epochs=20 --set augment.flip=true
              mmalign train --data photos/ --out run --model ViT-B-32 --pretrained openai
              mmalign train --out run --resume
    """
    from mmalign.config import override, read_toml
    from mmalign.training.train import configure
    from mmalign.training.train import train as run

    # A resumed run keeps its own configuration unless told otherwise.
    own = Path(out) / "config.toml"
    file = config or (str(own) if resume and own.exists() else None)
    values = read_toml(Path(file)) if file else {}
    values |= {k: v for k, v in words.items() if v is not None}
    if caption_keys:
        values["caption_keys"] = caption_keys
    where = f"{file} and --set" if settings and file else (file or "--set")
    built = configure(override(values, settings), where)
    _print(run(data, out, built, val=val, resume=resume), as_json)


@main.command()
@_model
@_sources()
@click.option(
    "--out", required=True, metavar="STORE", type=PLACE, help="The store, by convention NAME.store."
)
@click.option(
    "--thumbnails/--no-thumbnails", default=True, help="Store a small picture of each image."
)
@click.option(
    "--precision", type=click.Choice(["auto", "float32", "bfloat16", "int8"]), default="auto",
    show_default=True,
    help="Precision; auto is bfloat16 if the processor supports it and cosines stay above 0.999.",
)  # fmt: skip
@click.option(
    "--checksum", is_flag=True, help="Also compare the content of images that look unchanged."
)
@click.option(
    "--drop-removed", is_flag=True, help="Delete rows whose images are gone from the sources."
)
@click.option(
    "--yes", is_flag=True,
    help="Allow deleting more than a tenth of the rows, and changing the model of a store although "
    "some of its images cannot be read.",
)  # fmt: skip
@click.option(
    "--shard", "part", default="1/1", metavar="I/N", show_default=True,
    help="Embed only the I-th of N parts; N processes can fill one store.",
)  # fmt: skip
@_columns
@_json
def embed(
    *,
    model: str,
    data: tuple[str, ...],
    out: str,
    part: str,
    caption_keys: tuple[str, ...],
    as_json: bool,
    **words: Any,
) -> None:
    """Embed images and captions into a store.

    Run it again to resume, and to add new or changed images. Images that were moved or renamed are
    not embedded again. With another model than that of the store, all its rows are embedded again,
    and searches go on with the old vectors until the new ones are complete.

    \b
    Example:  mmalign embed --model run --data photos/ --out photos.store
              mmalign embed --model run --data photos/ --out photos.store --drop-removed
              mmalign embed --model ViT-B-32:openai --data 'm-{0..9}.tar' --out m.store --shard 1/4
    """
    from dataclasses import asdict

    from mmalign.embedding.embed import embed as run

    numbers = part.split("/")
    if len(numbers) != 2 or not all(n.isdecimal() for n in numbers):
        raise UsageError(f"--shard {part}: write i/n with i from 1 to n")
    keys = caption_keys or ("captions",)
    share = (int(numbers[0]), int(numbers[1]))
    report = run(model, data, out, caption_keys=keys, part=share, **words)
    if as_json:
        _print(asdict(report), as_json)


@main.command()
@_store
@click.option("--recall", default=0.95, show_default=True, help="Share of true neighbours to find.")
@click.option("--memory", default="2GB", show_default=True, help="Memory limit of the index.")
@click.option(
    "--queries", metavar="FILE", type=PLACE, help="Text queries to measure with, one per line."
)
@click.option(
    "--model", metavar="RUN_OR_NAME", type=PLACE,
    help="The model that encodes FILE, if it was moved since embedding.",
)  # fmt: skip
@_json
def index(
    *,
    store: Path,
    recall: float,
    memory: str,
    queries: str | None,
    model: str | None,
    as_json: bool,
) -> None:
    """Build an index over a store and measure its recall.

    Several kinds of index are tried, with the store's captions or the queries of FILE. A small
    store needs no index: every row is compared.

    \b
    Example:  mmalign index photos.store
              mmalign index photos.store --recall 0.95 --memory 300MB
    """
    from mmalign.search.build import build_index

    report = build_index(store, recall=recall, memory=memory, queries=queries, model=model)
    if as_json:
        _print(report, as_json)


@main.command()
@click.argument("stores", nargs=-1, metavar="STORE [STORE]...", type=FolderPath())
@click.argument("query")
@click.option("-k", default=10, show_default=True, help="Number of results.")
@click.option("--offset", default=0, show_default=True, help="Results to skip at the start.")
@click.option(
    "--to", metavar="MODALITY", type=TEXT,
    help="What to search: image (the default), text for the captions, or what else the store has.",
)  # fmt: skip
@_where
@click.option("--exact", is_flag=True, help="Compare every row, even if there is an index.")
@click.option(
    "--lexical", is_flag=True, help="Also find captions that have words of the query, by rank."
)
@click.option("--sheet", metavar="FILE.png", type=PLACE, help="Draw the hits as a contact sheet.")
@click.option(
    "--model", metavar="RUN_OR_NAME", type=PLACE, help="The model, if it was moved since embedding."
)
@_json
def search(
    *,
    stores: tuple[Path, ...],
    query: str,
    k: int,
    offset: int,
    to: Any,
    where: str | None,
    exact: bool,
    lexical: bool,
    sheet: str | None,
    model: str | None,
    as_json: bool,
) -> None:
    """Find the images of a store that are nearest to a text or an image.

    The last argument is the query, those before it are stores of one model. QUERY is an image if a
    file with this name exists. Anything else is text, in which operators between spaces count: +
    adds, - subtracts, ! excludes, and 2: in front is a weight. @cat.jpg is an image, row:ID a row
    of the store; "words in quotes" must occur in a caption; FIELD:VALUE, FIELD:>3 and FIELD:2..5
    filter by metadata. Put -- before a text that begins with a dash.

    If an index was built, hits of a text are likely, maybe or unlikely what was asked for; the exit
    code is 1 if all are unlikely, or there is none.

    \b
    Example:  mmalign search photos.store "a dog on a beach"
              mmalign search photos.store "沙滩上的狗" -k 5 --sheet hits.png
              mmalign search photos.store cat.jpg --to text
              mmalign search photos.store "@cat.jpg + snow - 0.5:grass"
              mmalign search photos.store "dress ! stripes price:<20"
              mmalign search photos.store scans.store "Prof. Zorvex" --lexical
              mmalign search photos.store "red" --where "label = 'dress' and price < 20"
    """
    import time
    from dataclasses import asdict

    from mmalign.progress import say
    from mmalign.search.model import model_of
    from mmalign.search.searcher import Searcher
    from mmalign.search.several import MultiSearcher
    from mmalign.store import open_store

    typed = query
    if not stores:
        raise click.MissingParameter(param_hint="'QUERY'", param_type="argument")
    if len(stores) > 1 and not all(store.is_dir() for store in stores[1:]):
        words = " ".join([*map(str, stores[1:]), typed])
        told = f"put its words in quotes: {words!r}"
        raise UsageError(f"only the last argument is the query, and others are stores: {told}")
    if sheet:
        from mmalign.search.sheet import Strip, check_sheet, draw_sheet

        check_sheet(Path(sheet))
    opened = [open_store(store) for store in stores]
    asked = _query(typed, {name: None for store in opened for name in store.fields})
    read_as = asked.read_as
    asked = _with_images(asked, typed)
    encoder = model_of(opened[0], model)
    (first, *others) = opened
    searcher: Searcher | MultiSearcher = (
        MultiSearcher(opened, encoder) if others else Searcher(first, encoder)
    )
    started = time.perf_counter()
    hits = searcher.search(
        asked, k, to=to, offset=offset, exact=exact, where=where, lexical=lexical
    )
    took_ms = (time.perf_counter() - started) * 1e3
    if sheet:
        pictures = [item for item, _ in asked.items if isinstance(item, bytes)]
        picture = pictures[0] if len(asked.items) == len(pictures) == 1 else b""
        draw_sheet([Strip(typed, _tiles(opened, hits), picture)], Path(sheet))
    if as_json:
        rows = [{k: v for k, v in asdict(h).items() if k != "row" and v is not None} for h in hits]
        answer = {
            "query": files.in_utf8(typed),
            "read_as": read_as,
            "hits": rows,
            "nothing_found": hits.nothing_found,
        }
        if isinstance(searcher, Searcher):
            answer["index"] = searcher.describe_index()
        _print({**answer, "took_ms": round(took_ms, 3)}, as_json)
    else:
        _show_hits(hits, read_as)
    if hits.nothing_found:
        narrowed = any(vars(hits.query.selection).values())
        why = ": no row matches the filters" if narrowed else ""
        say(f"nothing found{': these are only the nearest' if hits else why}")
        click.get_current_context().exit(1)


def _show_hits(hits: "Hits", read_as: dict[str, Any]) -> None:
    from mmalign.progress import say

    if not _is_plain(read_as):
        say(f"read as: {printable(read_as['text'])}")
    for hit in hits:
        words = hit.caption or (hit.captions[0] if hit.captions else "")
        score = f"{hit.score:.3f}" if hits.query.items else "-    "
        level = f"  {hit.level:<8}" if hit.level else ""
        by_words = "  words" if hit.words else ""
        show(_line(f"{hit.rank:>3}  {score}{level}{by_words}", openable(hit.uri), words))


def _tiles(stores: "Sequence[Store]", hits: "Sequence[Hit]") -> "list[Tile]":
    """Make the tiles of hits, each from its store."""
    from mmalign.search.sheet import tiles_of

    held = {str(store.path): store for store in stores}
    return [t for hit in hits for t in tiles_of(held.get(hit.store or "", stores[0]), [hit])]


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


def _query(typed: str, fields: Iterable[str]) -> "Query":
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


@main.command()
@_model
@_sources()
@click.option(
    "--classes", metavar="A,B,C", type=PLACE,
    help="Class names for zero-shot accuracy, or a file with one per line.",
)  # fmt: skip
@click.option(
    "--label-key", default="label", show_default=True, help="Metadata field with the class."
)
@_columns
@_json
def evaluate(
    *,
    model: str,
    data: tuple[str, ...],
    classes: str | None,
    label_key: str,
    caption_keys: tuple[str, ...],
    image_column: str | None,
    as_json: bool,
) -> None:
    """Measure retrieval (recall@1/5/10) and zero-shot accuracy.

    \b
    Example:  mmalign evaluate --model run --data val.tar
              mmalign evaluate --model run --data val.tar --caption-key captions_zh --json
              mmalign evaluate --model run --data val.tar --classes dress,hat --label-key label
    """
    from mmalign.evaluation.evaluate import evaluate as run

    names = _class_names(classes) if classes is not None else []
    keys = caption_keys or ("captions",)
    report = run(
        model, data, caption_keys=keys, image_column=image_column, classes=names,
        label_key=label_key,
    )  # fmt: skip
    _print(report, as_json)


def _class_names(classes: str) -> list[str]:
    try:
        is_file = os.path.isfile(classes)
        text = Path(classes).read_text(encoding="utf-8") if is_file else classes
    except UnicodeDecodeError as error:
        raise UsageError(f"--classes {classes}: not a text file: {error}") from None
    names = [w.strip() for w in (text.splitlines() if is_file else text.split(",")) if w.strip()]
    if not names:
        raise UsageError(f"--classes {classes}: contains no class name")
    return names


for _command in cli_store.COMMANDS:
    main.add_command(_command)
