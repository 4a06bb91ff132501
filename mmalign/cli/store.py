"""Commands for a store: its rows, its files, and other stores."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmalign.cli.options import (
    PLACE,
    TEXT,
    FolderPath,
    json_option,
    model_option,
    print_values,
    show,
    store_argument,
    where_option,
    yes_option,
)
from mmalign.errors import StoreError, UsageError
from mmalign.terminal import columns, openable, printable, shorten

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mmalign.store import Store

SHOWN = 10


@click.command()
@store_argument
@json_option
def info(store: Path, as_json: bool) -> None:
    """Show what a store holds.

    \b
    Example:  mmalign info photos.store
              mmalign info photos.store --json
    """
    from mmalign.cli.info import described, in_words
    from mmalign.store import open_store

    opened = open_store(store)
    values = described(opened)
    if as_json:
        print_values(values, as_json)
    else:
        for line in in_words(opened, values):
            show(line)


@click.command()
@store_argument
@click.option(
    "--sample", default=1.0, show_default=True, metavar="SHARE",
    help="Share of the shards and index files to read, chosen at random.",
)  # fmt: skip
@json_option
def verify(store: Path, sample: float, as_json: bool) -> None:
    """Compare every file of a store with its hash.

    The exit code is 1 if a file is damaged.

    \b
    Example:  mmalign verify photos.store
              mmalign verify photos.store --sample 0.1
    """
    from mmalign.store import verify as run

    damage = run(store, sample)
    if as_json:
        print_values({"damaged": damage}, as_json)
    else:
        read = "every file" if sample == 1 else "every file that was read"
        for line in damage or [f"{store}: {read} matches its hash"]:
            show(line)
    sys.exit(1 if damage else 0)


@click.command()
@store_argument
@json_option
def repair(store: Path, as_json: bool) -> None:
    """Move damaged files out of a store, and list what was lost.

    They are not deleted; `mmalign embed` adds lost rows again.

    \b
    Example:  mmalign repair photos.store
    """
    from mmalign.store import repair as run

    values = _as_lists(run(store))
    print_values(values, as_json)
    if not as_json:
        for name, value in values.items():
            for line in value if isinstance(value, list) else ():
                show(f"{name}: {line}")


@click.command()
@store_argument
@click.option(
    "--now", is_flag=True,
    help="Also remove files that are kept for an hour for other processes.",
)  # fmt: skip
@click.option(
    "--drop-next", is_flag=True,
    help="Drop the vectors of another model that `embed` has begun to build.",
)  # fmt: skip
@json_option
def compact(store: Path, now: bool, drop_next: bool, as_json: bool) -> None:
    """Free the space of deleted rows and old generations.

    Files that other processes may still read are kept for an hour; a later compact removes them.
    With --now, nothing of a deleted row remains on the disk: no vector, caption or thumbnail. Rows
    get new numbers, so an index must be built again. While vectors of another model are built,
    deleted rows stay.

    \b
    Example:  mmalign compact photos.store --now && mmalign index photos.store
    """
    from mmalign.store import compact as run

    print_values(_as_lists(run(store, now=now, drop_next=drop_next)), as_json)


@click.command()
@store_argument
@json_option
def upgrade(store: Path, as_json: bool) -> None:
    """Convert a store of format 2 to the current format.

    Rows, vectors and the index stay as they are. Until the end the store is as it was; if it is
    interrupted, run it again.

    \b
    Example:  mmalign upgrade photos.store
    """
    from mmalign.store import upgrade as run

    print_values(asdict(run(store)), as_json)


def _as_lists(report: Any) -> dict[str, Any]:
    """Return the fields of a report for JSON; in readable output the lists are separate."""

    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(report).items()}


@click.command()
@store_argument
@click.argument("ids", nargs=-1, metavar="[ID]...", type=TEXT)
@where_option
@click.option("--dry-run", is_flag=True, help="Show what would be deleted, and delete nothing.")
@yes_option
@json_option
def delete(
    *,
    store: Path,
    ids: tuple[str, ...],
    where: str | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Delete rows by id or by SQL.

    They are no longer found; `mmalign compact` frees their space.

    \b
    Example:  mmalign delete photos.store photos/cat.jpg photos/dog.jpg
              mmalign delete photos.store --where "label = 'dress' and price > 20" --dry-run
    """
    from mmalign.store import delete_rows, open_store, require_few

    _require_one("the ids of the rows to delete", ids, where)
    held = open_store(store)
    numbers = _selected(held, ids, where, "nothing was deleted")
    gone = held.rows(numbers, ("id", "uri"))
    deleted = 0
    if len(gone) and not dry_run:
        require_few(store, len(gone), len(held), yes)
        deleted = delete_rows(held, numbers)
    if as_json:
        answer = {"deleted": deleted, "dry_run": dry_run, "ids": [row["id"] for row in gone]}
        print_values({**answer, "rows": len(open_store(store))}, as_json)
        return
    for row in gone[:SHOWN]:
        show(shorten(_named(row), columns()))
    if len(gone) > SHOWN:
        show(f"... and {len(gone) - SHOWN} more")
    told = f"{len(gone)} would be deleted" if dry_run else f"{deleted} deleted"
    show(f"{told}; {store} has {len(open_store(store))} rows")


def _require_one(what: str, ids: tuple[str, ...], where: str | None) -> None:
    if bool(ids) == (where is not None):
        given = "both were" if ids else "neither was"
        raise UsageError(f"give either {what} or --where: {given} given")


def _named(row: dict[str, Any]) -> str:
    """Return the id of a row and its location, once if they are the same."""
    place = openable(row["uri"])
    return printable(row["id"] if place == row["id"] else f"{row['id']}  {place}")


def _selected(
    held: "Store", ids: tuple[str, ...], where: str | None, outcome: str = ""
) -> "NDArray[np.int64]":
    """Return row numbers, selected by SQL or by ids that must all exist.

    Args:
        held: The store.
        ids: The ids, if `where` is None.
        where: The SQL.
        outcome: The end of the message about unknown ids.
    """
    import numpy as np

    if where is not None:
        from mmalign.store.where import where as by_sql

        return by_sql(held, where)
    numbers = held.find(ids)
    unknown = [i for i, number in zip(ids, numbers, strict=True) if number < 0]
    if unknown:
        from mmalign.store.changes import unknown_ids

        told = unknown_ids(held.path, unknown, SHOWN)
        raise StoreError(f"{told}; {outcome}" if outcome else told)
    return np.unique(numbers)


@click.command()
@store_argument
@click.argument("ids", nargs=-1, metavar="[ID]...", type=TEXT)
@click.option(
    "--set", "settings", multiple=True, required=True, metavar="KEY=VALUE", type=TEXT,
    help="Field of meta to set, as TOML or plain text; null removes it. Repeatable.",
)  # fmt: skip
@where_option
@json_option
def update(
    *,
    store: Path,
    ids: tuple[str, ...],
    settings: tuple[str, ...],
    where: str | None,
    as_json: bool,
) -> None:
    """Set metadata of rows by id or by SQL, without embedding.

    All rows change at once. `mmalign embed` keeps the new values until it reads an image again: if
    its file, captions or metadata change in the source, or with --checksum. Then the metadata of
    the source replaces them.

    \b
    Example:  mmalign update photos.store --set label=dress photos/cat.jpg
              mmalign update photos.store --set price=12.5 --set draft=null --where "price > 20"
    """
    from mmalign.config import override
    from mmalign.store import open_store, update_rows

    _require_one("the ids of the rows to update", ids, where)
    values = override({}, settings, null=True)
    held = open_store(store)
    numbers = _selected(held, ids, where, "nothing was updated")
    print_values(asdict(update_rows(held, numbers, values)), as_json)


@click.command("list")
@store_argument
@where_option
@click.option(
    "-k", default=10, show_default=True, type=click.IntRange(min=1), help="Number of rows."
)
@click.option(
    "--offset", default=0, show_default=True, type=click.IntRange(min=0), help="Rows to skip."
)
@json_option
def list_(*, store: Path, where: str | None, k: int, offset: int, as_json: bool) -> None:
    """List rows in the order of the store.

    A line is the id, the location if it differs, and the first caption. With --json, rows also have
    all captions and their metadata, and `count` is the number of rows without -k and --offset.

    \b
    Example:  mmalign list photos.store -k 20 --offset 40
              mmalign list photos.store --where "label = 'dress'" --json
    """
    from mmalign.progress import say
    from mmalign.store import open_store
    from mmalign.store.schema import meta_values

    held = open_store(store)
    numbers = _live(held) if where is None else _selected(held, (), where)
    page = numbers[offset : offset + k]
    names = ("id", "uri", "captions", "meta") if as_json else ("id", "uri", "captions")
    rows = held.rows(page, names)
    if as_json:
        listed = [{**row, "meta": meta_values(row["id"], row["meta"])} for row in rows]
        print_values({"rows": listed, "count": len(numbers)}, as_json)
        return
    for row in rows:
        words = f"  {printable(row['captions'][0])}" if row["captions"] else ""
        show(shorten(f"{_named(row)}{words}", columns()))
    if len(page) < len(numbers):
        shown = f"rows {offset + 1} to {offset + len(page)}" if len(page) else "no rows"
        say(f"{shown} of {len(numbers)}")


def _live(held: "Store") -> "NDArray[np.int64]":
    import numpy as np

    if held.live is None:
        return np.arange(held.manifest.physical_rows)
    return np.flatnonzero(held.live)


@click.command()
@store_argument
@click.argument("ids", nargs=-1, required=True, metavar="ID...", type=TEXT)
@click.option(
    "--thumbnail", metavar="FILE.webp", type=PLACE, help="Write the picture of the row to a file."
)
@json_option
def get(*, store: Path, ids: tuple[str, ...], thumbnail: str | None, as_json: bool) -> None:
    """Show everything about rows except their vectors.

    \b
    Example:  mmalign get photos.store photos/cat.jpg
              mmalign get photos.store photos/cat.jpg --thumbnail cat.webp
    """
    from mmalign import files
    from mmalign.store import open_store

    if thumbnail and len(set(ids)) > 1:
        raise UsageError("--thumbnail writes one picture: give one id")
    held = open_store(store)
    _selected(held, ids, None)
    numbers = list(dict.fromkeys(held.find(ids).tolist()))
    rows = [_details(held, number) for number in numbers]
    if thumbnail:
        (row,) = held.rows(numbers, ("thumbnail",))
        if not row["thumbnail"]:
            raise StoreError(f"{store}: the row {ids[0]!r} has no thumbnail")
        files.write_bytes(Path(thumbnail), row["thumbnail"])
    if as_json:
        print_values({"rows": rows}, as_json)
        return
    for i, row in enumerate(rows):
        if i:
            show("")
        captions = {f"caption {n}": words for n, words in enumerate(row.pop("captions"), 1)}
        row["meta"] = {name: _as_text(value) for name, value in row["meta"].items()}
        print_values({"id": row.pop("id"), "uri": row.pop("uri"), **captions, **row}, as_json)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _details(held: "Store", number: int) -> dict[str, Any]:
    """Return everything about a row except its vectors, for JSON."""
    from mmalign.store import UNKNOWN
    from mmalign.store.schema import meta_values

    wanted = ("id", "uri", "captions", "meta", "stamp", "checksum", "thumbnail")
    (row,) = held.rows([number], wanted)
    shard = held.manifest.shards[held.shard_of(number)]
    return {
        **{name: row[name] for name in ("id", "uri", "captions")},
        "meta": meta_values(row["id"], row["meta"]),
        "stamp": f"{row['stamp']:016x}" if row["stamp"] else None,
        "checksum": row["checksum"].hex() if row["checksum"] != UNKNOWN else None,
        "thumbnail_bytes": len(row["thumbnail"]),
        "vectors": {m: len(held.vectors_of(m, number)) for m in held.manifest.model.positions},
        "precision": shard.precision or None,
        "row": number,
        "shard": shard.name,
    }


@click.command()
@click.argument("stores", nargs=-1, required=True, metavar="STORE STORE...", type=FolderPath())
@click.option("--out", required=True, metavar="OUT", type=FolderPath(), help="The store to create.")
@json_option
def merge(*, stores: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Merge stores of the same model into a new store.

    If several stores have a row with the same id, that of the last one is kept. Files are linked
    where the disk allows it, so they take no space twice. Indexes are not copied.

    \b
    Example:  mmalign merge photos.store more.store --out all.store
    """
    from mmalign.store import merge as run

    print_values(asdict(run(stores, out)), as_json)


@click.command()
@store_argument
@click.option(
    "--to", "out", required=True, metavar="OUT", type=PLACE, help="File or folder to create."
)
@click.option(
    "--format", "kind", type=click.Choice(["parquet", "npy", "hf"]), required=True,
    help="One parquet file; clip-retrieval's folder of .npy parts; a Hugging Face dataset.",
)  # fmt: skip
@where_option
@click.option("--thumbnails", is_flag=True, help="Include thumbnails in the parquet file.")
@json_option
def export(
    *, store: Path, out: str, kind: Any, where: str | None, thumbnails: bool, as_json: bool
) -> None:
    """Export the rows of a store for other programs.

    A row has its vectors, captions and metadata; npy has only the vector of the first caption.

    \b
    Example:  mmalign export photos.store --to photos.parquet --format parquet
              mmalign export photos.store --to dresses --format hf --where "label = 'dress'"
              mmalign export photos.store --to embeddings --format npy
    """
    from mmalign.exchange.export import export as run

    report = run(store, out, kind, where=where, thumbnails=thumbnails)
    if as_json:
        print_values(asdict(report), as_json)


@click.command("import")
@click.argument("folder", type=FolderPath())
@click.option(
    "--out",
    required=True,
    metavar="STORE",
    type=PLACE,
    help="The store, by convention NAME.store.",
)
@model_option
@json_option
def import_(*, folder: Path, out: str, model: str, as_json: bool) -> None:
    """Import the embeddings of a clip-retrieval folder into a store.

    The folder contains img_emb/, text_emb/ and metadata/. It does not say which model made the
    embeddings, so you must give it. Run the command again to resume.

    \b
    Example:  mmalign import embeddings --out photos.store --model ViT-B-32:openai
    """
    from mmalign.exchange.imports import import_parts

    report = import_parts(folder, out, model)
    if as_json:
        print_values(asdict(report), as_json)


COMMANDS = (
    info, list_, get, verify, repair, update, delete, compact, upgrade, merge, export, import_,
)  # fmt: skip
