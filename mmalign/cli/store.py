"""Commands for a store: info, verify, repair, delete, compact, upgrade, export, import."""

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
@json_option
def compact(store: Path, now: bool, as_json: bool) -> None:
    """Free the space of deleted rows and old generations.

    Files that other processes may still read are kept for an hour; a later compact removes them.
    With --now, nothing of a deleted row remains on the disk: no vector, caption or thumbnail. Rows
    get new numbers, so an index must be built again.

    \b
    Example:  mmalign compact photos.store --now && mmalign index photos.store
    """
    from mmalign.store import compact as run

    print_values(_as_lists(run(store, now=now)), as_json)


@click.command()
@store_argument
@json_option
def upgrade(store: Path, as_json: bool) -> None:
    """Make a store of an earlier format one of the current format.

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

    if bool(ids) == (where is not None):
        given = "both were" if ids else "neither was"
        raise UsageError(f"give either the ids of the rows to delete or --where: {given} given")
    held = open_store(store)
    numbers = _selected(held, ids, where)
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
        place = openable(row["uri"])
        named = row["id"] if place == row["id"] else f"{row['id']}  {place}"
        show(shorten(printable(named), columns()))
    if len(gone) > SHOWN:
        show(f"... and {len(gone) - SHOWN} more")
    told = f"{len(gone)} would be deleted" if dry_run else f"{deleted} deleted"
    show(f"{told}; {store} has {len(open_store(store))} rows")


def _selected(held: "Store", ids: tuple[str, ...], where: str | None) -> "NDArray[np.int64]":
    """Return row numbers, selected by SQL or by ids that must all exist."""
    import numpy as np

    if where is not None:
        from mmalign.store.where import where as by_sql

        return by_sql(held, where)
    numbers = held.find(ids)
    unknown = [repr(i) for i, number in zip(ids, numbers, strict=True) if number < 0]
    if unknown:
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        named = ", ".join(unknown[:SHOWN]) + more
        raise StoreError(f"{held.path}: no row has the id {named}; nothing was deleted")
    return np.unique(numbers)


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


COMMANDS = (info, verify, repair, delete, compact, upgrade, export, import_)
