"""The store: zero-copy reads, commits that are whole or absent, and damage that is named."""

import json
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmalign import open_store
from mmalign.errors import IdentityError, StoreError, VectorError
from mmalign.store import ModelCard, Row, Writer, commit_index, verify
from mmalign.store import manifest as manifests

DIM = 8
CARD = ModelCard("nano-0123", "somewhere/run", DIM)


def row(number: int, captions: int = 2) -> Row:
    rng = np.random.default_rng(number)
    vectors = rng.normal(size=(captions + 1, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    words = tuple(f"caption {number}.{c}" for c in range(captions))
    return Row(f"id{number}", f"/pictures/{number}.jpg", words, vectors[0], vectors[1:])


def fill(path: Path, numbers: range, rows_per_shard: int = 10) -> None:
    with Writer(path, CARD, rows_per_shard) as writer:
        for number in numbers:
            writer.add(row(number, captions=number % 3))


def test_rows_come_back_as_they_went_in(tmp_path: Path) -> None:
    fill(tmp_path, range(25))
    store = open_store(tmp_path)
    assert len(store) == 25
    assert [s.rows for s in store.manifest.shards] == [10, 10, 5]
    images = np.concatenate(store.vectors("image"))
    assert images.dtype == np.float16
    for i in (0, 9, 10, 24):
        assert np.allclose(images[i], row(i, i % 3).image_embedding, atol=1e-3)
        found = store.rows([i], ("id", "captions", "meta"))[0]
        assert found == {
            "id": f"id{i}",
            "captions": list(row(i, i % 3).captions),
            "meta": "{}",
        }
    texts = np.concatenate(store.vectors("text"))
    assert len(texts) == len(store.caption_owners) == sum(i % 3 for i in range(25))
    owner = int(store.caption_owners[7])
    first = int(np.searchsorted(store.caption_owners, owner))
    assert np.allclose(texts[7], row(owner, owner % 3).text_embeddings[7 - first], atol=1e-3)


def test_vectors_are_views_of_the_file(tmp_path: Path) -> None:
    fill(tmp_path, range(5))
    (view,) = open_store(tmp_path).vectors("image")
    assert not view.flags.owndata
    assert not view.flags.writeable


def test_a_reader_keeps_its_generation(tmp_path: Path) -> None:
    fill(tmp_path, range(5))
    before = open_store(tmp_path)
    fill(tmp_path, range(5, 9))
    assert len(before) == 5
    assert len(np.concatenate(before.vectors("image"))) == 5
    assert len(open_store(tmp_path)) == 9


def test_what_was_not_committed_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Writer(tmp_path, CARD, 10) as writer:
        for number in range(15):
            writer.add(row(number))
        raise RuntimeError("killed")
    assert len(open_store(tmp_path)) == 10


def test_ctrl_c_keeps_what_was_embedded(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path, CARD, 10) as writer:
        for number in range(15):
            writer.add(row(number))
        raise KeyboardInterrupt
    assert len(open_store(tmp_path)) == 15


@pytest.mark.parametrize("damage", [b"", b"{", b'{"format": 99}', b"\xff\xfe"])
def test_an_unreadable_generation_falls_back(
    tmp_path: Path, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path, range(20))
    newest = sorted(tmp_path.glob("manifest-*.json"))[-1]
    newest.write_bytes(damage)
    assert len(open_store(tmp_path)) == 10
    assert newest.name in capsys.readouterr().err
    assert any(newest.name in line for line in verify(tmp_path))
    # The next commit takes a number nobody has had.
    fill(tmp_path, range(30, 35))
    assert len(open_store(tmp_path)) == 15


def test_no_store_and_no_readable_generation(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        open_store(tmp_path / "none.store")
    with pytest.raises(StoreError, match="folder without a manifest"):
        open_store(tmp_path)
    fill(tmp_path, range(3))
    for manifest in tmp_path.glob("manifest-*.json"):
        manifest.write_bytes(b"torn")
    with pytest.raises(StoreError, match="no generation can be read"):
        open_store(tmp_path)


def test_two_models_do_not_mix(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    with pytest.raises(IdentityError, match="nano-0123.*nano-9999"):
        Writer(tmp_path, ModelCard("nano-9999", "elsewhere", DIM))


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (np.full(DIM, np.nan, np.float32), "norm nan"),
        (np.zeros(DIM, np.float32), "norm 0"),
        (np.ones(DIM, np.float32), "not 1"),
        (np.ones(DIM + 1, np.float32), "8 dimensions"),
    ],
)
def test_bad_vectors_never_reach_the_disk(tmp_path: Path, vector: np.ndarray, message: str) -> None:
    good = row(0)
    bad = Row("x", "x", good.captions, vector, good.text_embeddings)
    with pytest.raises(VectorError, match=message), Writer(tmp_path, CARD) as writer:
        writer.add(bad)
    assert len(open_store(tmp_path)) == 0


def test_verify_names_every_damage(tmp_path: Path) -> None:
    fill(tmp_path, range(30))
    assert verify(tmp_path) == []
    first, second, _ = (tmp_path / "shards" / s.name for s in open_store(tmp_path).manifest.shards)
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    first.write_bytes(content)
    second.unlink()
    damage = verify(tmp_path)
    assert len(damage) == 2
    assert any(first.name in d and "not what was written" in d for d in damage)
    assert any(second.name in d and "missing" in d for d in damage)


def test_a_cut_shard_is_refused_by_name(tmp_path: Path) -> None:
    fill(tmp_path, range(5))
    (shard,) = (tmp_path / "shards").iterdir()
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(StoreError, match=shard.name):
        open_store(tmp_path).vectors("image")


def test_an_index_over_vanished_shards_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, range(5))
    with pytest.raises(StoreError, match="shards changed"):
        commit_index(tmp_path, "abc", ("other.arrow",))
    assert open_store(tmp_path).manifest.index is None


def _write_some(path: str, first: int) -> None:
    fill(Path(path), range(first, first + 20), rows_per_shard=2)


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    fill(tmp_path, range(1))
    context = multiprocessing.get_context("spawn")
    writers = [
        context.Process(target=_write_some, args=(str(tmp_path), 100 * (w + 1))) for w in range(2)
    ]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    assert [p.exitcode for p in writers] == [0, 0]
    ids = open_store(tmp_path).column("id")
    assert len(ids) == len(set(ids)) == 41


def test_a_generation_made_meanwhile_is_built_upon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer commits after this one has read the newest generation."""
    fill(tmp_path, range(1))
    parse, meanwhile = manifests.parse, [range(10, 13)]

    def slow_parse(content: bytes) -> manifests.Manifest:
        read = parse(content)
        if meanwhile:
            fill(tmp_path, meanwhile.pop())
        return read

    def change(base: manifests.Manifest) -> manifests.Manifest:
        return replace(base, tombstones=(*base.tombstones, "id0"))

    model = open_store(tmp_path).manifest.model
    monkeypatch.setattr(manifests, "parse", slow_parse)
    manifests.commit(tmp_path, change, model)
    newest = open_store(tmp_path).manifest
    assert newest.tombstones == ("id0",)
    assert newest.rows == 4


def test_failures_are_read_once_each(tmp_path: Path) -> None:
    fill(tmp_path, range(1))
    lines = [{"uri": "a", "reason": "x"}, {"uri": "a", "reason": "y"}, {"uri": "b", "reason": "z"}]
    torn = "\n".join(json.dumps(line) for line in lines) + '\n{"uri": "c'
    (tmp_path / "failures.jsonl").write_text(torn)
    assert [f["reason"] for f in open_store(tmp_path).failures()] == ["y", "z"]


def test_a_copied_store_opens(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "copy.store")
    assert len(open_store(tmp_path / "copy.store")) == 96
