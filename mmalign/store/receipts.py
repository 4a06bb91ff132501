"""Receipts: shards that are written but not yet committed, and the committer that names them.

    rows -> write_rows -> immutable files and a receipt -> Committer -> one generation

Many processes may write rows, on many machines. A receipt is a value that can be sent as JSON; what
it lists becomes part of the store in one generation, once, however often it is committed.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmalign import files
from mmalign.errors import IdentityError, StoreError
from mmalign.store import groups
from mmalign.store import manifest as manifests
from mmalign.store.groups import MOST_ROWS, Groups, Shard, is_count
from mmalign.store.ids import OpenShards
from mmalign.store.manifest import Manifest
from mmalign.store.model_card import (
    ModelCard,
    invalid_model,
    joined_model,
    model_card_of,
    model_values,
)
from mmalign.store.schema import Row, row_batch, thumbnail_batch, vector_batch
from mmalign.store.shards import ShardReader, write_shard

# What a receipt says of skipped samples: texts, numbers and truths by name.
Skipped = dict[str, Any]


@dataclass(frozen=True)
class Receipt:
    """Shards that hold the rows of a range of records, and what is to be reported of these."""

    model: ModelCard
    """The model that made the vectors, with the towers of their modalities."""
    shards: tuple[Shard, ...] = ()
    replaces: tuple[tuple[str, str], ...] = ()
    """Ids and uris of other rows, which are deleted in the same commit if they still have this uri:
    another sample may have taken the id. A row with the id of a new row is not listed."""
    item: str = ""
    """The name of the work item that was encoded; empty if there was none."""
    first: int = 0
    end: int = 0
    """Records of the item from `first` to before `end` are done: written, skipped or unchanged."""
    counts: dict[str, int] = field(default_factory=dict)
    """What happened to the records, by name."""
    skipped: tuple[Skipped, ...] = ()
    """Records without a row, and why."""
    moved_rows: tuple[int, ...] = ()
    """Numbers of rows, in the generation the item was cut against, found at another place."""

    def to_json(self) -> str:
        """Return the receipt as JSON; it begins like a group of shards."""
        values = {
            "shards": json.loads(groups.render(self.shards))["shards"],
            "model": model_values(self.model),
            "replaces": self.replaces,
            "item": self.item,
            "range": [self.first, self.end],
            "counts": self.counts,
            "skipped": self.skipped,
            "moved_rows": self.moved_rows,
        }
        return json.dumps(values, separators=(",", ":"))

    @staticmethod
    def from_json(text: str | bytes) -> "Receipt":
        """Read a receipt.

        Raises:
            StoreError: It was not made by mmalign.
        """
        try:
            values = json.loads(text)
            shards = groups.parse(text if isinstance(text, bytes) else text.encode())
            first, end = values["range"]
            receipt = Receipt(
                model_card_of(values["model"]),
                shards,
                tuple((name, uri) for name, uri in values["replaces"]),
                values["item"],
                first,
                end,
                dict(values["counts"]),
                tuple(map(dict, values["skipped"])),
                tuple(values["moved_rows"]),
            )
            wrong = next(_invalid(receipt), None)
        except StoreError as error:
            raise StoreError(f"a receipt {error}") from None
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            wrong = f"invalid fields: {error}"
        if wrong:
            raise StoreError(f"a receipt not made by mmalign: {wrong}")
        return receipt


def _invalid(receipt: Receipt) -> Iterator[str]:
    """Yield values that mmalign never writes."""
    replaced = (text for place in receipt.replaces for text in place)
    if not _are(str, (receipt.item, *replaced, *receipt.counts)):
        yield "a name that is no text"
    yield from invalid_model(receipt.model)
    numbers = (receipt.first, receipt.end, *receipt.counts.values(), *receipt.moved_rows)
    if not all(is_count(number, MOST_ROWS) for number in numbers) or receipt.first > receipt.end:
        yield "a number that cannot be"
    for skipped in receipt.skipped:
        if not all(isinstance(value, str | int) for value in skipped.values()):
            yield f"the skipped sample {skipped!r}"
    for shard in receipt.shards:
        if shard.deleted_rows:
            yield f"the shard {shard.name!r} with deleted rows"
    if len({shard.name for shard in receipt.shards}) < len(receipt.shards):
        yield "the same shard twice"


def _are(kind: type, values: Iterable[Any]) -> bool:
    return all(isinstance(value, kind) for value in values)


def write_rows(
    store: Path,
    model: ModelCard,
    rows: Sequence[Row],
    *,
    precision: str = "",
    replaces: Iterable[tuple[str, str]] = (),
) -> Receipt:
    """Write rows as a shard; nothing is committed, so to others the store stays as it is.

    Args:
        store: The folder.
        model: The model of the vectors.
        rows: Of several rows with one id, the last one counts. Without rows nothing is written.
        precision: The arithmetic that the vectors were computed in, to be recorded.
        replaces: Ids and uris of other rows, to be deleted in the same commit.
    """
    by_id: dict[str, Row] = {}
    for row in rows:
        by_id.pop(row.id, None)
        by_id[row.id] = row
    last = list(by_id.values())
    if not last:
        return Receipt(model, replaces=tuple(replaces))
    files.make_folder(store / "shards")
    shard = write_shard(
        store,
        row_batch(last),
        vector_batch(last, model.dim, model.positions),
        thumbnail_batch([row.thumbnail for row in last]),
        precision=precision,
        space=model.identity,
    )
    return Receipt(model, (shard,), tuple(replaces))


def commit_receipts(store: str | Path, receipts: Sequence[Receipt], model: ModelCard) -> Manifest:
    """Make the rows of receipts part of a store, all in one generation; see `Committer`."""
    return Committer(Path(store), model).commit(receipts)


class Committer:
    """Names the shards of receipts in a generation. It keeps the store's shards open; final."""

    def __init__(self, store: Path, model: ModelCard) -> None:
        """Open or create a store.

        Raises:
            IdentityError: The store holds embeddings of another model.
            StoreError: Its newest generation is damaged.
        """
        self.store, self.model = store, model
        self._open_shards, self._groups = OpenShards(store, model), Groups(store)
        for folder in ("shards", "groups"):
            files.make_folder(store / folder)
        manifests.commit(
            store, lambda base: self._with_towers(base, model), model, groups=self._groups
        )

    def _with_towers(self, base: Manifest, model: ModelCard) -> Manifest:
        return replace(base, model=joined_model(self.store, base.model, model))

    def commit(self, receipts: Sequence[Receipt]) -> Manifest:
        """Commit receipts in one generation. Those committed before change nothing.

        Of rows with the same id, that of the last receipt is kept; it replaces the one in the
        store.

        Raises:
            IdentityError: A receipt is of another model; nothing was committed.
            StoreError: A file of a receipt is missing or damaged; nothing was committed.
        """
        for receipt in receipts:
            if receipt.model.identity != self.model.identity:
                raise IdentityError(
                    f"{self.store} holds embeddings of {self.model.identity}, the receipt "
                    f"{receipt.item!r} those of {receipt.model.identity}: nothing was committed"
                )
        return manifests.commit(
            self.store,
            lambda base: self._with_rows(base, receipts),
            self.model,
            groups=self._groups,
        )

    def _with_rows(self, base: Manifest, receipts: Sequence[Receipt]) -> Manifest:
        base = self._with_towers(base, self.model)
        new = _not_committed(base, receipts)
        for receipt in new:
            base = self._with_towers(base, receipt.model)
        shards = [shard for receipt in new for shard in receipt.shards]
        if not shards:
            return base
        manifests.require_files(self.store, base, manifests.names_of(shards))
        ids = [self._ids(shard, base.model) for shard in shards]
        replaced = [place for receipt in new for place in receipt.replaces]
        gone = [name for part in ids for name in part]
        kept = self._open_shards.with_ids_deleted(base.shards, gone)
        if replaced:
            kept = self._open_shards.with_rows_at_deleted(kept, replaced)
        return replace(base, shards=(*kept, *_last_of_each_id(shards, ids)))

    def _ids(self, shard: Shard, model: ModelCard) -> list[str]:
        reader = ShardReader(self.store, shard, model)
        reader.open_all()
        return reader.ids()


def _not_committed(base: Manifest, receipts: Sequence[Receipt]) -> list[Receipt]:
    """Return the receipts that no commit has named.

    One whose shards were rewritten since counts as committed as long as their files are listed as
    retired; later the files are missing. So it never brings back rows that were deleted.
    """
    known = {shard.name for shard in base.shards}
    retired = {retired.name for retired in base.retired}
    new = []
    for receipt in receipts:
        names = {shard.name for shard in receipt.shards}
        if not names & known and not manifests.names_of(receipt.shards) & retired:
            new.append(receipt)
        known |= names
    return new


def _last_of_each_id(shards: Sequence[Shard], ids: Sequence[Sequence[str]]) -> list[Shard]:
    """Return shards in which a row is deleted if a later one has its id."""
    later: set[str] = set()
    kept = []
    for shard, its in zip(reversed(shards), reversed(ids), strict=True):
        kept.append(shard.with_rows_deleted([n for n, i in enumerate(its) if i in later]))
        later.update(its)
    return kept[::-1]
