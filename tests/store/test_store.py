"""The store: zero-copy reads, and commits that are whole or absent."""

import errno
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from store_samples import CARD, DIM, fill, flip, ids_of, row, versions, write_index

from mmalign import open_store
from mmalign.errors import IdentityError, StoreError, VectorError
from mmalign.store import (
    ModelCard,
    Row,
    Tower,
    Writer,
    commit_index,
    compact,
    delete,
    pair_vectors,
    repair,
    verify,
)
from mmalign.store import manifest as manifests
from mmalign.store import reader as readers
from mmalign.store.groups import Groups


def test_rows_come_back_as_they_went_in(tmp_path: Path) -> None:
    fill(tmp_path, range(25))
    store = open_store(tmp_path)
    assert len(store) == 25
    assert [s.rows for s in store.manifest.shards] == [10, 10, 5]
    assert store.live is None
    images = np.concatenate(store.vectors("image"))
    assert images.dtype == np.float16
    for i in (0, 9, 10, 24):
        assert np.allclose(images[i], row(i, i % 3).vectors["image"][0], atol=1e-3)
        found = store.rows([i], ("id", "captions", "meta", "thumbnail", "stamp", "checksum"))[0]
        assert found == {
            "id": f"id{i}",
            "captions": list(row(i, i % 3).captions),
            "meta": "{}",
            "thumbnail": bytes(i % 5),
            "stamp": 2**64 - 1,
            "checksum": bytes(32),
        }
    texts = np.concatenate(store.vectors("text"))
    assert len(texts) == len(store.owners("text")) == sum(i % 3 for i in range(25))
    owner = int(store.owners("text")[7])
    first = int(np.searchsorted(store.owners("text"), owner))
    assert np.allclose(texts[7], row(owner, owner % 3).vectors["text"][7 - first], atol=1e-3)


def test_rows_keep_the_order_they_were_asked_in(tmp_path: Path) -> None:
    fill(tmp_path, range(25))
    store = open_store(tmp_path)
    assert [r["id"] for r in store.rows([24, 0, 10, 0], ("id",))] == ids_of([24, 0, 10, 0])
    assert store.rows([], ("id",)) == []
    for number in (-1, 25):
        with pytest.raises(IndexError, match="rows 0 to 24"):
            store.rows([3, number], ("id",))


def test_vectors_are_views_of_the_file(tmp_path: Path) -> None:
    fill(tmp_path, range(5))
    (view,) = open_store(tmp_path).vectors("image")
    assert not view.flags.owndata
    assert not view.flags.writeable
    with pytest.raises(StoreError, match=r"no 'imag' vectors: did you mean 'image'"):
        open_store(tmp_path).vectors("imag")


def test_only_the_shards_that_are_asked_for_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, range(50))
    delete(tmp_path, ids_of([3]))
    opened = []

    def counting(store: Path, shard: manifests.Shard, model: ModelCard) -> readers.ShardReader:
        opened.append(shard.name)
        return open_shard(store, shard, model)

    open_shard = readers.ShardReader
    monkeypatch.setattr(readers, "ShardReader", counting)
    store = open_store(tmp_path)
    assert len(store) == 49
    assert store.live is not None
    assert opened == []
    store.rows([12, 31, 14, 12], ("id", "uri"))
    names = [s.name for s in store.manifest.shards]
    assert sorted(opened) == sorted([names[1], names[3]])
    store.vectors("image")
    assert len(opened) == len(set(opened)) == 5


def test_open_shards_hold_no_file_handles(tmp_path: Path) -> None:
    """A process may have 1,024 by default, and a store thousands of shards."""
    fill(tmp_path, range(50), rows_per_shard=1)
    store = open_store(tmp_path)
    store.vectors("image")
    handles = [p for p in Path("/proc/self/fd").glob("*") if p.resolve().suffix == ".arrow"]
    assert handles == []


def test_a_reader_keeps_its_generation(tmp_path: Path) -> None:
    fill(tmp_path, range(5))
    before = open_store(tmp_path)
    fill(tmp_path, range(3, 9), version=1)
    assert versions(before) == dict.fromkeys(ids_of(range(5)), 0)
    assert versions(open_store(tmp_path)) == {f"id{i}": int(i >= 3) for i in range(9)}


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


# ---------------------------------------------------------------- generations


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"format": 99}', b"\xff\xfe"])
def test_an_unreadable_generation_falls_back(
    tmp_path: Path, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path, range(20))
    newest = manifests.generations(tmp_path)[0]
    newest.write_bytes(damage)
    assert len(open_store(tmp_path)) == 10
    assert newest.name in capsys.readouterr().err
    assert any(newest.name in line for line in verify(tmp_path))
    # Behind a newer generation, what only this one names would be lost.
    with pytest.raises(
        StoreError, match=f"{newest.name}: unreadable: .*; first run `mmalign repair"
    ):
        fill(tmp_path, range(30, 35))
    repair(tmp_path)
    # The next commit takes a number nobody has had.
    fill(tmp_path, range(30, 35))
    assert len(open_store(tmp_path)) == 15
    assert newest not in manifests.generations(tmp_path)


def test_a_changed_manifest_is_noticed(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    content = manifests.generations(tmp_path)[0].read_bytes()
    manifest = manifests.parse(content, Groups(tmp_path))
    assert manifests.render(manifest) == content
    for bit in range(0, len(content) * 8, 7):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):
            manifests.parse(bytes(changed), Groups(tmp_path))


def test_another_format_is_refused_and_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, range(3))
    fill(tmp_path / "later", range(3))
    later = open_store(tmp_path / "later").manifest
    with monkeypatch.context() as patch:
        patch.setattr(manifests, "FORMAT", 4)
        content = manifests.render(later)
    (tmp_path / "manifest-00000009.json").write_bytes(content)
    for use in (open_store, verify, lambda path: fill(path, range(3))):
        with pytest.raises(
            StoreError, match=r"manifest-00000009.json: format 4, but .* formats 2 and 3"
        ):
            use(tmp_path)


@pytest.mark.parametrize(("code", "opens"), [(errno.EIO, True), (errno.EACCES, False)])
def test_what_may_be_whole_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, opens: bool
) -> None:
    """A disk that fails is damage. Whoever may not read the newest generation must not go on."""
    fill(tmp_path, range(20))
    newest, read_bytes = manifests.generations(tmp_path)[0], Path.read_bytes

    def failing(path: Path) -> bytes:
        if path == newest:
            raise OSError(code, "no")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    if opens:
        assert len(open_store(tmp_path)) == 10
        return
    for use in (open_store, verify, repair, lambda path: fill(path, range(3))):
        with pytest.raises(StoreError, match=rf"{newest.name}: cannot be read: no"):
            use(tmp_path)


def test_no_store_and_no_readable_generation(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        open_store(tmp_path / "none.store")
    with pytest.raises(StoreError, match="folder without a manifest"):
        open_store(tmp_path)
    fill(tmp_path, range(3))
    for manifest in manifests.generations(tmp_path):
        manifest.write_text('{"format": 1}')
    with pytest.raises(StoreError, match="no generation can be read.*an early version of mmalign"):
        open_store(tmp_path)


def test_two_models_do_not_mix(tmp_path: Path) -> None:
    other = ModelCard("nano-9999", "elsewhere", DIM)
    # Both make the store at once: the one who comes second is refused, at its next commit at last.
    writer = Writer(tmp_path, CARD)
    with pytest.raises(IdentityError, match=r"nano-0123.*nano-9999"):
        Writer(tmp_path, other)
    writer.model = other
    writer.add(row(0))
    with pytest.raises(IdentityError, match=r"nano-0123.*nano-9999"):
        writer.commit()


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (np.full(DIM, np.nan, np.float32), "norm nan"),
        (np.zeros(DIM, np.float32), "norm 0"),
        (np.ones(DIM, np.float32), "not 1"),
        (np.ones(DIM + 1, np.float32), "must have shape \\(V, 8\\)"),
    ],
)
def test_bad_vectors_never_reach_the_disk(tmp_path: Path, vector: np.ndarray, message: str) -> None:
    good = row(0)
    bad = Row("x", "x", good.captions, pair_vectors(vector, good.vectors["text"]))
    with pytest.raises(VectorError, match=message), Writer(tmp_path, CARD) as writer:
        writer.add(bad)
    assert len(open_store(tmp_path)) == 0


def test_an_index_over_vanished_shards_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, range(5))
    with pytest.raises(StoreError, match="shards changed"):
        commit_index(tmp_path, "abc", ("other.arrow",), CARD.identity)
    assert open_store(tmp_path).manifest.index is None


def test_an_index_lasts_while_rows_keep_their_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path, range(5))
    folder = write_index(tmp_path)
    fill(tmp_path, range(3, 9), version=1)
    delete(tmp_path, ids_of([0]))
    assert open_store(tmp_path).index_folder == folder
    flip(folder / "index.json")
    assert open_store(tmp_path).index_folder is None
    assert "index.json: damaged; exact search is used instead" in capsys.readouterr().err


def test_a_generation_made_meanwhile_is_built_upon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer commits after this one has read the newest generation."""
    fill(tmp_path, range(1))
    parse, meanwhile = manifests.parse, [range(10, 13)]

    def slow_parse(content: bytes, groups: Groups) -> manifests.Manifest:
        read = parse(content, groups)
        if meanwhile:
            fill(tmp_path, meanwhile.pop())
        return read

    def change(base: manifests.Manifest) -> manifests.Manifest:
        return replace(base, shards=(base.shards[0].with_rows_deleted([0]), *base.shards[1:]))

    monkeypatch.setattr(manifests, "parse", slow_parse)
    manifests.commit(tmp_path, change, CARD)
    assert open_store(tmp_path).column("id") == ids_of(range(10, 13))


def test_a_number_that_is_free_again_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer sleeps while others commit on and old generations are removed."""
    fill(tmp_path, range(1))
    parse, meanwhile = manifests.parse, [1]

    def slow_parse(content: bytes, groups: Groups) -> manifests.Manifest:
        read = parse(content, groups)
        while meanwhile and meanwhile.pop():
            fill(tmp_path, range(10, 14), rows_per_shard=1)
            for old in manifests.generations(tmp_path)[1:]:
                old.unlink()
        return read

    writer = Writer(tmp_path, CARD)
    writer.add(row(20))
    monkeypatch.setattr(manifests, "parse", slow_parse)
    writer.commit()
    assert open_store(tmp_path).column("id") == ids_of([0, 10, 11, 12, 13, 20])


def test_a_generation_without_a_change_is_not_made(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    before = open_store(tmp_path).manifest
    assert manifests.commit(tmp_path, lambda base: base, CARD) == before
    assert open_store(tmp_path).manifest == before


def test_a_shard_removed_before_its_commit_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    (shard,) = open_store(tmp_path).manifest.shards

    def change(base: manifests.Manifest) -> manifests.Manifest:
        file = replace(shard.row_file, name="gone.arrow")
        return replace(base, shards=(*base.shards, replace(shard, name="gone", row_file=file)))

    with pytest.raises(StoreError, match=r"gone.arrow was removed"):
        manifests.commit(tmp_path, change, CARD)
    assert len(open_store(tmp_path)) == 3


def test_a_copied_store_opens(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "copy.store")
    assert len(open_store(tmp_path / "copy.store")) == 96


def test_a_third_modality_has_its_vectors_and_positions(tmp_path: Path) -> None:
    """Moments of sounds beside images and texts; a row may have none of a modality."""
    card = ModelCard(
        "nano-0123", "somewhere/run", DIM, (*CARD.towers, Tower("sound", "", "seconds"))
    )
    rng = np.random.default_rng(0)
    sounds = rng.normal(size=(5, DIM)).astype(np.float32)
    sounds /= np.linalg.norm(sounds, axis=1, keepdims=True)
    moments = np.array([[0, 1], [1, 2.5], [0, 3], [3, 4], [4, 9]], np.float32)
    with Writer(tmp_path, card) as writer:
        for number, part in enumerate((slice(0, 2), slice(2, 2), slice(2, 5))):
            one = row(number, 1)
            vectors = {"sound": sounds[part]} | ({} if number == 2 else dict(one.vectors))
            positions = {"sound": moments[part]} if part.start < part.stop else {}
            captions = () if number == 2 else one.captions
            writer.add(replace(one, captions=captions, vectors=vectors, positions=positions))
    store = open_store(tmp_path)
    assert store.owners("sound").tolist() == [0, 0, 2, 2, 2]
    assert store.owners("image").tolist() == [0, 1]
    assert np.allclose(np.concatenate(store.vectors("sound")), sounds, atol=1e-3)
    assert np.array_equal(store.positions("sound", np.arange(5)), moments)
    assert np.allclose(store.vectors_of("sound", 2), sounds[2:], atol=1e-3)
    compact(tmp_path)
    assert np.array_equal(open_store(tmp_path).positions("sound", np.arange(5)), moments)
    bad = replace(row(9), vectors={"sound": sounds[:1]})
    foreign = replace(row(9), vectors={"smell": sounds[:1]})
    for wrong, reason in (
        (bad, r"positions of sound must be \(1, 2\), got None"),
        (foreign, "the store has no vectors of 'smell'"),
    ):
        with pytest.raises(VectorError, match=reason), Writer(tmp_path, card) as writer:
            writer.add(wrong)
