"""Stores that are not as they should be: one line each, and what is known stays readable."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from command import call, complaint
from format2_store import write_format2
from store_samples import CARD, DIM, encoder_of, fill, flip, ids_of, row

from mmalign.errors import IdentityError, StoreError
from mmalign.search.searcher import Searcher
from mmalign.store import Tower, Writer, open_store, repair, update, upgrade, verify
from mmalign.store import manifest as manifests
from mmalign.store.shards import write_file


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A store of format 3 with shards of format 2: repaired before it was upgraded."""
    path = tmp_path / "half.store"
    write_format2(path, [[row(n) for n in range(k, k + 5)] for k in (0, 5, 10)], CARD, [7])
    flip(path / "shards" / f"{0:016x}.arrow")
    repair(path)
    with Writer(path, CARD) as writer:
        writer.add(row(20))
    return path


def test_a_half_upgraded_store_is_read_and_says_how_to_go_on(half: Path) -> None:
    store = open_store(half)
    assert store.manifest.format == 3
    left = ids_of([5, 6, 8, 9, 10, 11, 12, 13, 14, 20])
    assert store.column("id") == left
    vector = row(8).vectors["image"][0]
    hits = Searcher(store, encoder_of()).search(vector, 3)
    assert (hits[0].id, len(hits)) == ("id8", 3)
    with pytest.raises(StoreError, match=r"has shards of format 2; run `mmalign upgrade"):
        update(half, ids_of([8]), {"seen": True})
    assert upgrade(half).shards == 2
    assert update(half, ids_of([8]), {"seen": True}).rows == 1
    assert open_store(half).column("id") == left
    assert verify(half) == []


def test_a_foreign_tower_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    card = replace(CARD, towers=(Tower("image", "image-1"), Tower("text", "text-1", "number")))
    with Writer(tmp_path / "a.store", card) as writer:
        writer.add(row(1))
    before = open_store(tmp_path / "a.store").manifest
    other = replace(card, towers=(Tower("image", "image-2"), card.towers[1]))
    with pytest.raises(IdentityError, match="image vectors of the tower image-1, the model has im"):
        Writer(tmp_path / "a.store", other)
    boxes = replace(card, towers=(Tower("image", "image-1", "box"), card.towers[1]))
    with pytest.raises(IdentityError, match="positions of the kind '', not 'box'"):
        Writer(tmp_path / "a.store", boxes)
    assert open_store(tmp_path / "a.store").manifest == before


def rewritten(path: Path, change: Callable[[pa.RecordBatch], pa.RecordBatch]) -> None:
    """Give the first shard other vectors, under a hash that fits them."""
    store = open_store(path)
    shard = store.manifest.shards[0]
    with pa.memory_map(str(path / "shards" / shard.vector_file.name)) as source:
        batch = change(pa.ipc.open_file(source).get_batch(0))
        file = write_file(path, "other", batch)
    shards = (replace(shard, vector_file=file), *store.manifest.shards[1:])
    manifests.commit(path, lambda base: replace(base, shards=shards), CARD)


def with_more_rows(batch: pa.RecordBatch) -> pa.RecordBatch:
    table = pa.Table.from_batches([batch, batch]).combine_chunks()
    return table.to_batches()[0]


def with_more_positions(batch: pa.RecordBatch) -> pa.RecordBatch:
    positions = batch.column("text.position")
    more = pa.ListArray.from_arrays(
        pa.array(np.arange(len(batch) + 1) * 3, pa.int32()),
        pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(3 * len(batch), np.float32)), 1),
    )
    assert more.type == positions.type
    columns = [
        more if name == "text.position" else batch.column(name) for name in batch.schema.names
    ]
    return pa.record_batch(columns, schema=batch.schema)


def with_vectors_of_nobody(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Lists end before the vectors do."""
    images = batch.column("image")
    values = pa.concat_arrays([images.values, images.values])
    more = pa.ListArray.from_arrays(images.offsets, values)
    return pa.record_batch([more, *batch.columns[1:]], schema=batch.schema)


def test_vectors_of_more_rows_than_there_are_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "a.store", range(20))
    rewritten(tmp_path / "a.store", with_more_rows)
    said = complaint(1, "export", tmp_path / "a.store", "--to", tmp_path / "x", "--format", "npy")
    assert "20 rows, but" in said
    assert "10 rows were written" in said
    store = open_store(tmp_path / "a.store")
    assert store.column("id") == ids_of(range(20))
    assert call("list", tmp_path / "a.store").exit_code == 0
    assert np.allclose(store.vectors_of("image", 15), row(15).vectors["image"], atol=1e-3)


def test_positions_of_vectors_that_are_not_there_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "a.store", range(10))
    rewritten(tmp_path / "a.store", with_more_positions)
    store = open_store(tmp_path / "a.store")
    with pytest.raises(StoreError, match="does not have one position per text vector"):
        store.positions("text", np.arange(3))
    assert len(store.vectors("text")[0]) == len(store.owners("text"))


def test_vectors_of_no_row_are_never_found(tmp_path: Path) -> None:
    fill(tmp_path / "a.store", range(10))
    rewritten(tmp_path / "a.store", with_vectors_of_nobody)
    store = open_store(tmp_path / "a.store")
    assert [len(part) for part in store.vectors("image")] == [10]
    hits = Searcher(store, encoder_of()).search(row(4).vectors["image"][0], 20)
    assert len(hits) == 10
    assert hits[0].id == "id4"
    assert store.vectors("image")[0].shape == (10, DIM)
