"""`mmalign embed`: images and captions of any source into a store of unit vectors.

    scan -> what the store lacks -> work items -> encode -> receipts -> one committer -> manifest

Another run adds what is new or changed; after a kill it continues after the last commit.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mmalign import files
from mmalign.data import (
    Record,
    Skip,
    Sources,
    SpilledRecords,
    as_sources,
    count_skipped,
    refuse_own_sources,
    report_skips,
)
from mmalign.embedding.changes import ChangeSet, ScanOptions, find_changes, find_removed
from mmalign.embedding.rebuild import Rebuilt, rebuild
from mmalign.embedding.work import card_of, encode, slices
from mmalign.encoding.batches import report_truncated
from mmalign.encoding.modalities import is_model_of, model_card
from mmalign.errors import DataError, StoreError, UsageError
from mmalign.evaluation.evaluate import compare
from mmalign.modality import IMAGE
from mmalign.model import (
    Encoder,
    Precision,
    in_precision,
    keep_weights,
    load_model,
    remember,
    to_fastest,
)
from mmalign.progress import bar, say
from mmalign.store import (
    Committer,
    Receipt,
    Store,
    add_failures,
    delete_rows,
    join_small_shards,
    open_or_new,
    open_store,
    require_few,
)

# Samples that are also embedded in float32, to report the loss from eight bits.
COMPARED = 128


@dataclass(frozen=True)
class EmbedReport:
    """What a run of `embed` did; each sample that it found ends in one of the first five."""

    added: int
    """Samples that the store did not have."""
    changed: int
    """Samples whose row was replaced: other content, captions, metadata or location."""
    present: int
    """Samples that are unchanged in the store."""
    failed: int
    """Samples that cannot be used; `Store.failures` lists them with the reasons."""
    passed_over: int
    """Files that are not images, by their extension."""
    cut_captions: int
    """Captions embedded in this run that are longer than the model reads and were truncated."""
    moved: int
    """Changed samples whose row followed their content to another location."""
    read: int
    """Images that were read."""
    encoded: int
    """Images read whose vectors were computed; the others were embedded before."""
    removed: int
    """Rows deleted because their source is gone; only with `drop_removed`."""
    rebuilt: int
    """Rows embedded again because the store held embeddings of another model."""
    rows: int
    images_per_s: float
    """Images read per second, from the end of the scan."""
    precision: str


def embed(
    model: str | Path | Encoder,
    sources: Sources,
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
    """Embed samples that the store does not hold yet, or that have changed.

    If the store holds embeddings of another model, its rows are embedded again first. Searches go
    on with the old vectors until all new ones are there; an index has to be built again.

    Args:
        model: A run folder, `NAME:TAG`, or an encoder that was loaded from one of these.
        sources: Folders, tars, tables, URLs, as `data.scan` takes them.
        out: The store; created if it does not exist.
        caption_keys: The fields that hold the captions.
        image_column: The table column that holds images, or their paths.
        thumbnails: Keep a small WebP of each image, so that results can be shown.
        precision: "auto", "float32", "bfloat16" or "int8", see `model.in_precision`.
        checksum: Read every image that the store holds, and compare its content.
        drop_removed: Delete the rows whose images were in the sources but are no longer there.
            What could not be listed or read counts as still there.
        yes: Let `drop_removed` delete more than a tenth of the rows, and let another model take
            over the store even if images of rows cannot be read.
        part: (i, n): embed only the i-th of n equal parts of the samples, so that n processes
            can work on one store.

    Raises:
        DataError: Nothing usable in the sources.
        IdentityError: The store has vectors of a modality that the model does not make.
        StoreError: More than a tenth of the rows would be deleted; everything else is done. Or
            images of rows cannot be read again, so that the store keeps its model.
        UsageError: The store is a source, is inside one, or contains one.
    """
    path, sources = Path(out), as_sources(sources)
    _refuse_misuse(model, sources, path, drop_removed, part)
    float32_encoder = to_fastest(model if isinstance(model, Encoder) else load_model(model))
    encoder, used_precision = in_precision(float32_encoder, precision)
    options = ScanOptions(sources, caption_keys, image_column, checksum, part)
    store = open_or_new(path, model_card(float32_encoder))
    keep_weights(encoder)
    remember(float32_encoder)
    with files.scratch_in(path), SpilledRecords() as spilled:
        rebuilt = Rebuilt()
        if not is_model_of(float32_encoder, store.manifest.model):
            new = model_card(float32_encoder, store.modalities)
            rebuilt = rebuild(path, encoder, new, options, precision=used_precision, yes=yes)
            store = open_store(path)
        if not rebuilt.is_complete:
            return _report_of_a_part(rebuilt, store, used_precision)
        changes = find_changes(store, options, spilled)
        if used_precision == "int8" and len(spilled) >= COMPARED:
            _report_int8_loss(float32_encoder, encoder, list(islice(spilled, COMPARED)))
        del float32_encoder
        run = _Run(changes)
        committer = Committer(path, card_of(store, encoder, changes.modalities))
        run.fill(committer, encoder, used_precision, thumbnails)
    counts = run.outcomes()
    _list_failures(path, changes, counts)
    dropped = _drop(store, find_removed(changes, run.moved_rows), yes) if drop_removed else 0
    _join(path)
    report = EmbedReport(
        **counts,
        cut_captions=run.counts["cut_captions"],
        moved=run.counts["moved"],
        read=run.read,
        encoded=run.counts["encoded"],
        removed=dropped,
        rebuilt=rebuilt.rows,
        rows=len(open_store(path)),
        images_per_s=run.read / max(run.seconds, 1e-9),
        precision=used_precision,
    )
    say(_summary(report, out))
    return report


def _refuse_misuse(
    model: str | Path | Encoder,
    sources: Sequence[str],
    path: Path,
    drop_removed: bool,
    part: tuple[int, int],
) -> None:
    if not 1 <= part[0] <= part[1]:
        raise UsageError(f"--shard {part[0]}/{part[1]}: write i/n with i from 1 to n")
    if drop_removed and part[1] > 1:
        raise UsageError("--drop-removed needs all samples: run it without --shard")
    refuse_own_sources(path, sources)
    if isinstance(model, Encoder) and not model.source:
        raise UsageError(
            "this model was never saved, so a later search could not load it: call save_model first"
        )


def _drop(store: Store, gone: list[int], yes: bool) -> int:
    require_few(store.path, len(gone), len(open_store(store.path)), yes)
    return delete_rows(store, gone) if gone else 0


def _report_of_a_part(rebuilt: Rebuilt, store: Store, precision: str) -> EmbedReport:
    """Return the report of a run that embedded rows again, and left others to other parts."""
    return EmbedReport(
        added=0, changed=0, present=0, failed=0, passed_over=0, cut_captions=0, moved=0, read=0,
        encoded=0, removed=0, rebuilt=rebuilt.rows, rows=len(store), images_per_s=0.0,
        precision=precision,
    )  # fmt: skip


def _join(path: Path) -> None:
    """Join small shards; if that fails, the rows are in the store all the same."""
    try:
        join_small_shards(path)
    except (StoreError, OSError) as error:
        say(f"{path}: small shards stay as they are, nothing is lost: {error}")


class _Run:
    """Encodes what a scan found, commits the receipts, and adds up what they say."""

    def __init__(self, changes: ChangeSet) -> None:
        self.changes = changes
        self.counts: Counter[str] = Counter()
        self.moved_rows: list[int] = []
        self.read = 0
        self.seconds = 0.0

    def fill(
        self, committer: Committer, encoder: Encoder, precision: str, thumbnails: bool
    ) -> None:
        """Encode and commit everything, one receipt after the other."""
        started, count = time.monotonic(), len(self.changes.records)
        with bar("embed", count) as progress:

            def show(done: int, busy: str) -> None:
                progress.update(done)
                progress.set_postfix_str(busy, refresh=False)

            items = slices(self.changes, thumbnails=thumbnails)
            for receipt in encode(
                items, self.changes.stored, encoder, precision=precision, count=count, progress=show
            ):
                _commit(committer, receipt)
                self._add(receipt)
        report_truncated(encoder, self.counts["cut_captions"])
        self.seconds = time.monotonic() - started

    def _add(self, receipt: Receipt) -> None:
        self.counts.update(receipt.counts)
        self.changes.skips += [Skip(**skipped) for skipped in receipt.skipped]
        self.moved_rows += receipt.moved_rows
        self.read += receipt.end - receipt.first

    def outcomes(self) -> dict[str, int]:
        """Count the samples by outcome."""
        return {
            "added": self.counts["added"],
            "changed": self.counts["changed"],
            "present": self.counts["present"] + self.changes.present,
            "failed": count_skipped(self.changes.skips, "sample"),
            "passed_over": count_skipped(self.changes.skips, "extension"),
        }


def _commit(committer: Committer, receipt: Receipt) -> None:
    """Commit a receipt, also if Ctrl-C comes meanwhile: rows encoded so far are kept."""
    try:
        committer.commit([receipt])
    except KeyboardInterrupt:
        committer.commit([receipt])
        raise


def _summary(report: EmbedReport, out: str | Path) -> str:
    parts = [
        f"{report.added} added",
        f"{report.changed} changed" + (f" ({report.moved} moved)" if report.moved else ""),
        f"{report.present} already there",
        f"{report.failed} failed",
        f"{report.passed_over} passed over",
        f"{report.removed} removed",
    ]
    always = (0, 2, 3)
    shown_parts = [p for i, p in enumerate(parts) if i in always or not p.startswith("0 ")]
    return f"{', '.join(shown_parts)}: {report.rows} rows in {out}"


def _report_int8_loss(float32_encoder: Encoder, encoder: Encoder, sample: list[Record]) -> None:
    try:
        say(f"int8 compared with float32: {compare(float32_encoder, encoder, sample)}")
    except DataError as error:
        # A failed comparison does not stop the run: other samples may be usable.
        say(f"int8 cannot be compared with float32: {error}")


def _list_failures(path: Path, changes: ChangeSet, counts: dict[str, int]) -> None:
    """List failed samples and report their number; mark earlier failures that were resolved."""
    skips_by_uri = {s.uri: s for s in changes.skips if s.affects != "nothing"}
    rows: list[dict[str, Any]] = [
        {"id": s.id, "uri": s.uri, "reason": s.reason, "embedded": s.sample_is_used}
        for s in skips_by_uri.values()
    ]
    store = open_store(path)
    before = [f for f in store.failures() if f["uri"] not in skips_by_uri and not f["embedded"]]
    rows_by_id = store.find([f["id"] for f in before])
    rows += [
        {**failure, "reason": None}
        for failure, row in zip(before, rows_by_id.tolist(), strict=True)
        if row >= 0 and len(store.vectors_of(IMAGE.name, row))
    ]
    add_failures(path, rows)
    used = counts["added"] + counts["changed"] + counts["present"]
    report_skips(changes.skips, found=changes.found_count, used=used, where=path / "failures.jsonl")
