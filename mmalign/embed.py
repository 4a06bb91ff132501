"""`mmalign embed`: images and captions of any source into a store of unit vectors.

    scan -> what the store lacks -> decode and encode, overlapping -> shards -> manifest

Run again, it adds what is new or changed; killed, it goes on where the last committed shard ended.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mmalign.data import Record, Spool, report_skips
from mmalign.encoding import report_cut
from mmalign.errors import DataError, IdentityError, UsageError
from mmalign.evaluate import compare
from mmalign.model import Encoder, Precision, in_precision, keep_weights, load_model, to_fastest
from mmalign.pipeline import Encoded, Pipeline
from mmalign.progress import bar, say
from mmalign.store import (
    ModelCard,
    Row,
    Store,
    Writer,
    add_failures,
    delete_rows,
    meta_json,
    open_or_new,
    open_store,
    require_few,
)
from mmalign.todo import Todo, Wanted, find_todo, removed

COMMIT_SECONDS = 60.0
# Samples that are embedded in float32 as well, to say what eight bits cost.
COMPARED = 128


@dataclass(frozen=True)
class EmbedReport:
    """What a run of `embed` did."""

    added: int
    """Rows that are new, or replace one whose source has changed."""
    changed: int
    """Samples whose source has changed since they were embedded."""
    present: int
    failed: int
    removed: int
    """Rows deleted as their source is gone; only where that was asked for."""
    rows: int
    images_per_s: float
    precision: str


def embed(
    model: str | Path,
    sources: Sequence[str],
    out: str | Path,
    *,
    caption_keys: Sequence[str] = ("captions",),
    image_column: str | None = None,
    thumbnails: bool = True,
    precision: Precision = "auto",
    checksum: bool = False,
    drop_removed: bool = False,
    yes: bool = False,
    part: tuple[int, int] = (1, 1),
) -> EmbedReport:
    """Embed what the store does not hold yet, or holds in an older state.

    Args:
        model: A run folder or `NAME:TAG`.
        sources: Folders, tars, tables, URLs, as `data.scan` takes them.
        out: The store; made if it does not exist.
        caption_keys: Where the captions are.
        image_column: The column of tables that holds images, or their paths.
        thumbnails: Keep a small WebP of each image, so that results can be shown.
        precision: "auto", "float32", "bfloat16" or "int8", see `model.in_precision`.
        checksum: Read every image that the store holds, and compare its content.
        drop_removed: Delete the rows whose images lay in the sources and are there no more. What
            could not be listed or read counts as there.
        yes: Let `drop_removed` delete more than a tenth of the rows.
        part: (i, n): embed only the i-th of n equal parts of the samples, so that n processes
            can work on one store.

    Raises:
        DataError: Nothing usable in the sources.
        IdentityError: The store belongs to another model.
        StoreError: More than a tenth of the rows would be deleted. All else is done.
    """
    if not 1 <= part[0] <= part[1]:
        raise UsageError(f"--shard {part[0]}/{part[1]}: write i/n with i from 1 to n")
    if drop_removed and part[1] > 1:
        raise UsageError("--drop-removed looks at all samples: run it without --shard")
    path = Path(out)
    plain = to_fastest(load_model(model))
    encoder, got = in_precision(plain, precision)
    card = ModelCard(encoder.identity, encoder.source, encoder.dim)
    store = _open(path, card, plain)
    keep_weights(encoder)
    with Spool() as spool:
        todo = find_todo(store, Wanted(sources, caption_keys, image_column, checksum, part), spool)
        present = todo.present
        if got == "int8" and len(spool) >= COMPARED:
            _say_what_it_costs(plain, encoder, list(islice(spool, COMPARED)))
        del plain
        added, seconds = _write(Writer(path, card), encoder, todo, thumbnails)
    _list_failures(path, todo)
    dropped = _drop(store, removed(store, sources, todo), yes) if drop_removed else 0
    failed, rows = sum(not s.kept for s in todo.skips), len(open_store(path))
    changed = f" ({todo.changed} had changed)" if todo.changed else ""
    gone_too = f", {dropped} removed" if dropped else ""
    say(
        f"{added} added{changed}, {present} already there, {failed} failed{gone_too}: "
        f"{rows} rows in {out}"
    )
    rate = added / max(seconds, 1e-9)
    return EmbedReport(added, todo.changed, present, failed, dropped, rows, rate, got)


def _drop(store: Store, gone: list[int], yes: bool) -> int:
    require_few(store.path, len(gone), len(open_store(store.path)), yes)
    return delete_rows(store.path, gone, store.manifest.generation) if gone else 0


def _open(path: Path, card: ModelCard, plain: Encoder) -> Store:
    try:
        return open_or_new(path, card)
    except IdentityError as error:
        fault = plain.former_fault(open_store(path).manifest.model.identity)
        if not fault:
            raise
        raise IdentityError(f"{path}: {fault}") from error


def _write(writer: Writer, encoder: Encoder, todo: Todo, thumbnails: bool) -> tuple[int, float]:
    """Embed what is to be; return the number of rows and the seconds it took."""
    pipeline = Pipeline(encoder, thumbnails=thumbnails)
    started = committed_at = time.monotonic()
    added = 0
    with writer, bar("embed", len(todo.records)) as progress:
        for good, lost in pipeline.run(todo.records):
            todo.skips += lost
            for encoded in good:
                writer.add(_row(encoded))
            if time.monotonic() - committed_at > COMMIT_SECONDS:
                writer.commit()
                committed_at = time.monotonic()
            added += len(good)
            progress.update(len(good) + len(lost))
            progress.set_postfix_str(pipeline.describe(), refresh=False)
    report_cut(encoder, pipeline.texts.cut)
    return added, time.monotonic() - started


def _say_what_it_costs(plain: Encoder, encoder: Encoder, sample: list[Record]) -> None:
    try:
        say(f"int8 beside float32: {compare(plain, encoder, sample)}")
    except DataError as error:
        # What cannot be compared may still be embedded: others may be better.
        say(f"int8 is not compared with float32: {error}")


def _row(encoded: Encoded) -> Row:
    record = encoded.record
    return Row(
        id=record.id,
        uri=record.uri,
        captions=record.captions,
        image_embedding=encoded.image_D,
        text_embeddings=encoded.texts_CD,
        meta=meta_json(record.meta),
        thumbnail=encoded.item.thumbnail,
        stamp=encoded.item.stamp,
        checksum=encoded.item.checksum,
    )


def _list_failures(path: Path, todo: Todo) -> None:
    """List what was lost, and say how much; what was lost before and is not now is resolved."""
    lost = {s.uri: s for s in todo.skips}
    rows: list[dict[str, Any]] = [
        {"id": s.id, "uri": s.uri, "reason": s.reason, "embedded": s.kept} for s in lost.values()
    ]
    store = open_store(path)
    before = [f for f in store.failures() if f["uri"] not in lost and not f["embedded"]]
    there = store.find([f["id"] for f in before])
    rows += [{**f, "reason": None} for f, row in zip(before, there, strict=True) if row >= 0]
    add_failures(path, rows)
    report_skips(todo.skips, todo.total, path / "failures.jsonl")
