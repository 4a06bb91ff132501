"""A store's life in a dozen acts, each of which may be killed, or refused by the disk.

An act takes the ledger of a store, does one thing to the store, and leaves in the ledger what was
acknowledged: after an error or a kill, what may have been done is noted as coming.
"""

import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from disk import SimulatedDisk, using
from ledger import CARD, NEXT, Failures, Ledger, Rows, State, index_content, row

from mmalign import files
from mmalign.index import write_description
from mmalign.store import (
    NextSpace,
    Receipt,
    Writer,
    add_failures,
    changes,
    commit_index,
    commit_receipts,
    compact,
    delete,
    join_small_shards,
    open_store,
    repair,
    write_rows,
)
from mmalign.store.shards import ShardReader

ROWS_PER_SHARD = 4
DAY_S = 86_400


class Life:
    """A store on a simulated disk, and what was promised of it; final."""

    def __init__(self, disk: SimulatedDisk, ledger: Ledger) -> None:
        self.disk, self.ledger = disk, ledger

    @property
    def path(self) -> Path:
        return self.disk.root / "deep" / "a.store"

    def copy(self, root: Path) -> "Life":
        """Return an equal life on another disk."""
        return Life(self.disk.copy(root), self.ledger)

    def looked(self, state: State | None) -> None:
        """Note what can be seen, of which some may not be sure to last."""
        coming = (self.ledger.state, *self.ledger.coming)
        self.ledger = replace(self.ledger, state=state, coming=coming)

    @contextlib.contextmanager
    def doing(self, after: State) -> Iterator[None]:
        """Promise a state when the block ends well; when not, it may be so."""
        self.ledger = replace(self.ledger, coming=(*self.ledger.coming, after))
        yield
        self.ledger = replace(self.ledger, state=after, coming=())

    @contextlib.contextmanager
    def listing(self, failures: Failures) -> Iterator[None]:
        torn = self.ledger.torn
        before = self.ledger.failures_coming
        self.ledger = replace(self.ledger, failures_coming=(*before, failures), torn=True)
        yield
        held = {**self.ledger.failures, **failures}
        left = tuple({u: r for u, r in b.items() if u not in failures} for b in before)
        self.ledger = replace(self.ledger, failures=held, failures_coming=left, torn=torn)


def committing(rows: Rows, rows_per_shard: int = 100) -> Callable[[Life], None]:
    """Write rows; each commit is acknowledged by itself."""

    def act(life: Life) -> None:
        names = list(rows)
        model = life.ledger.model
        with Writer(life.path, model, rows_per_shard) as writer:
            for first in range(0, len(names), rows_per_shard):
                part = {n: rows[n] for n in names[first : first + rows_per_shard]}
                with life.doing(_with_rows(life.ledger, part)):
                    for name, version in part.items():
                        writer.add(row(name, version, model))
                    writer.commit()

    return act


def _with_rows(ledger: Ledger, rows: Rows) -> State:
    return replace(ledger.state or State({}), rows={**ledger.rows, **rows})


def create(life: Life) -> None:
    with life.doing(life.ledger.state or State({})):
        Writer(life.path, CARD)


def deleting(names: Sequence[str]) -> Callable[[Life], None]:
    def act(life: Life) -> None:
        assert life.ledger.state
        held = set(open_store(life.path).column("id"))
        gone = [name for name in names if name in held]
        # If all are gone, nothing is promised anew.
        if gone:
            kept = {n: v for n, v in life.ledger.rows.items() if n not in gone}
            with life.doing(replace(life.ledger.state, rows=kept)):
                assert delete(life.path, gone) == len(gone)

    return act


def index(life: Life) -> None:
    assert life.ledger.state
    name = secrets.token_hex(6)
    folder = life.path / "index" / name
    files.make_folder(folder)
    shards = tuple(s.name for s in open_store(life.path).manifest.shards)
    content = index_content(shards)
    files.write_through(folder / "image.faiss", lambda path: Path(path).write_bytes(content))
    write_description(folder, {"name": name, "shards": list(shards)})
    with life.doing(replace(life.ledger.state, index=name)):
        commit_index(life.path, name, shards, life.ledger.model.identity)


def fail(life: Life) -> None:
    for failures in ({"u": "torn", "v": "empty" * 400}, {"u": None, "w": "half \udcff a letter"}):
        with life.listing(failures):
            lines = [
                {"id": u, "uri": u, "reason": r, "embedded": False} for u, r in failures.items()
            ]
            add_failures(life.path, lines)


def compacting(life: Life, *, now: bool = False) -> None:
    assert life.ledger.state
    with life.doing(replace(life.ledger.state, index=None)):
        compact(life.path, ROWS_PER_SHARD, now=now)


def purging(life: Life) -> None:
    compacting(life, now=True)


def age(path: Path) -> None:
    """Make all that lies there two days old."""
    for file in (path, *path.rglob("*")):
        os.utime(file, (time.time() - 2 * DAY_S,) * 2)


def damage(life: Life) -> None:
    """Flip a bit in the last shard; what is promised from now on is what `repair` brings."""
    store = open_store(life.path)
    shard = store.manifest.shards[-1]
    numbers = range(store.manifest.physical_rows - shard.rows, store.manifest.physical_rows)
    lost = store.rows([n for n in numbers if store.live is None or store.live[n]], ("id", "uri"))
    file = life.path / "shards" / shard.row_file.name
    place = file.read_bytes().index(row(lost[0]["id"], life.ledger.rows[lost[0]["id"]]).checksum)
    life.disk.flip(file, place * 8)
    names = {values["id"] for values in lost}
    kept = {n: v for n, v in life.ledger.rows.items() if n not in names}
    life.ledger = replace(
        life.ledger,
        state=State(kept, None, life.ledger.model),
        failures_coming=({v["uri"]: f"lost: shard {shard.name} damaged" for v in lost},),
        damaged=True,
    )


def repairing(life: Life) -> None:
    assert life.ledger.state
    with life.doing(life.ledger.state), life.listing(life.ledger.failures_coming[0]):
        repair(life.path)
    life.ledger = replace(life.ledger, damaged=False)


def build(life: Life) -> None:
    """Write the vectors of another model beside those of the store."""
    assert life.ledger.state
    with life.doing(life.ledger.state):
        build_missing(life.path)


def swap(life: Life) -> None:
    """Let them take the place of those of the store, when all are there."""
    with life.doing(State(life.ledger.rows, None, NEXT)):
        build_missing(life.path)
        while NextSpace(life.path, NEXT).swap({}):
            build_missing(life.path)


def build_missing(path: Path) -> None:
    new = NextSpace(path, NEXT)
    new.begin()
    store, written = open_store(path), {}
    for shard in store.manifest.shards:
        if shard.next is None and not new.is_current(store.manifest):
            reader = ShardReader(path, shard, store.manifest.model)
            versions = [json.loads(meta)["version"] for meta in reader.column("meta").to_pylist()]
            rows = [row(*one, NEXT) for one in zip(reader.ids(), versions, strict=True)]
            written[shard.name] = None, new.write(shard, rows)
    new.commit(written)


def written(life: Life, rows: Rows, replaces: Rows | None = None) -> Receipt:
    """Write rows and commit nothing; return the receipt as whoever commits it reads it."""
    places = [(name, row(name, version).uri) for name, version in (replaces or {}).items()]
    receipt = write_rows(life.path, CARD, [row(*one) for one in rows.items()], replaces=places)
    return Receipt.from_json(receipt.to_json())


def encoding(life: Life) -> None:
    """Nobody commits what was written: it is garbage."""
    assert life.ledger.state
    with life.doing(life.ledger.state):
        written(life, {"f0": 1, "a2": 2})


def with_received(ledger: Ledger) -> State:
    """What a store holds after `receiving`."""
    after = _with_rows(ledger, {"f0": 2, "a2": 4, "f1": 1})
    return State({name: v for name, v in after.rows.items() if name != "e1"}, after.index)


def receiving(life: Life) -> None:
    """Commit two receipts in one generation, and both once more."""
    with life.doing(with_received(life.ledger)):
        receipts = [written(life, {"f0": 2, "a2": 3}, {"e1": 1}), written(life, {"a2": 4, "f1": 1})]
        commit_receipts(life.path, receipts, CARD)
        commit_receipts(life.path, receipts[::-1], CARD)


def joining(life: Life) -> None:
    """Join small shards; two are enough."""
    assert life.ledger.state
    fewest, changes.FEWEST_JOINED = changes.FEWEST_JOINED, 2
    try:
        with life.doing(life.ledger.state):
            join_small_shards(life.path)
    finally:
        changes.FEWEST_JOINED = fewest


ACTS: dict[str, Callable[[Life], None]] = {
    "create": create,
    "few": committing({"a0": 1, "a1": 1, "a2": 1, "a3": 1}),
    "many": committing({"b0": 1, "b1": 1, "b2": 1, "b3": 1, "b4": 1}, rows_per_shard=2),
    "replace": committing({"a1": 2, "b3": 2, "c0": 1}),
    "delete": deleting(["a3", "b0"]),
    "index": index,
    "grow": committing({"d0": 1, "d1": 1}),
    "fail": fail,
    "compact": compacting,
    "after": committing({"d0": 2, "e0": 1, "e1": 1}),
    "purge": purging,
    "damage": damage,
    "repair": repairing,
    "again": committing({"d0": 3, "e0": 2}),
    "encode": encoding,
    "receive": receiving,
    "join": joining,
    "build": build,
    "meanwhile": committing({"e1": 3, "g0": 1}),
    "swap": swap,
    "swapped": committing({"e0": 3, "h0": 1}),
}


def days_later(life: Life) -> None:
    """Compact when everything is old: whoever is in the middle of something was asleep."""
    age(life.path)
    compacting(life)


def born(root: Path, act: str) -> Life:
    """Live up to an act."""
    root.mkdir()
    (root / "deep").mkdir()
    life = Life(SimulatedDisk(root), Ledger())
    with using(life.disk):
        for name, do in ACTS.items():
            if name == act:
                break
            do(life)
    if life.path.exists():
        # What was there before is old enough to be garbage.
        age(life.path)
    return life
