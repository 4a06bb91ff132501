"""A store gets another model: its rows are embedded again beside the old vectors, then swapped."""

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import answer, call, complaint, follow
from conftest import jpeg, write_tar
from store_samples import flip, write_index
from stub_encoder import StubEncoder, stub, use_stub

import mmalign.store as stores
from mmalign import Row, Searcher
from mmalign.embedding import rebuild
from mmalign.embedding.embed import EmbedReport, embed
from mmalign.encoding.modalities import model_card
from mmalign.errors import IdentityError, StoreError
from mmalign.store import (
    NextSpace,
    Store,
    Writer,
    commit_index,
    compact,
    delete,
    merge,
    open_store,
    pair_vectors,
    repair,
    update,
    verify,
)
from mmalign.store import manifest as manifests

OLD, NEW, THIRD = "old", "new-12", "third"
SHARDS, PAIRS = 3, 2
ROWS = SHARDS * PAIRS


@pytest.fixture(autouse=True)
def _stub(monkeypatch: pytest.MonkeyPatch) -> None:
    use_stub(monkeypatch)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder for pictures and captions."""
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


@pytest.fixture
def path(photos: Path, tmp_path: Path) -> Path:
    """A store of photos by the old model, in several shards."""
    for shard in range(SHARDS):
        for number in range(PAIRS * shard, PAIRS * (shard + 1)):
            add(photos, number)
        run(OLD, photos, tmp_path / "a.store")
    return tmp_path / "a.store"


def add(photos: Path, number: int, picture: int | None = None) -> Path:
    """Write a picture with one caption or two."""
    file = photos / f"{number:03d}.jpg"
    file.write_bytes(jpeg(number if picture is None else picture))
    captions = [f"picture {number}", f"number {number}"][: 1 + number % 2]
    file.with_suffix(".json").write_text(json.dumps({"captions": captions}))
    return file


def run(model: str, source: Path, path: Path, **options: Any) -> EmbedReport:
    return embed(model, [str(source)], path, **options)


def held(store: Store) -> dict[str, dict[str, np.ndarray]]:
    """The vectors of each row by its id."""
    ids, modalities = store.column("id"), store.manifest.model.positions
    return {
        name: {m: store.vectors_of(m, number) for m in modalities}
        for name, number in zip(ids, store.find(ids).tolist(), strict=True)
    }


def assert_as_embedded_anew(path: Path, source: Path, model: str = NEW) -> None:
    """The store holds what an empty one holds after the same sources."""
    fresh_path = path.with_name("fresh.store")
    run(model, source, fresh_path)
    fresh, store = open_store(fresh_path), open_store(path)
    assert store.manifest.model == fresh.manifest.model
    assert store.manifest.next is None
    assert {(s.next, s.space, s.precision) for s in store.manifest.shards} == {
        (None, model, "float32")
    }
    found, wanted = held(store), held(fresh)
    assert found.keys() == wanted.keys()
    for name, vectors in wanted.items():
        for modality, own in vectors.items():
            assert np.array_equal(found[name][modality], own), (name, modality)
    assert verify(path) == []
    shutil.rmtree(fresh_path)


def assert_still_old(path: Path) -> None:
    """Whoever opens the store sees the old vectors, all of them."""
    store = open_store(path)
    assert store.manifest.model.identity == OLD
    captions = dict(zip(store.column("id"), store.column("captions"), strict=True))
    for name, vectors in held(store).items():
        assert vectors["image"].shape == (1, StubEncoder().dim), name
        assert np.allclose(vectors["text"], stub(OLD).encode_texts(captions[name]), atol=1e-3)
    assert len(Searcher(store, stub(OLD)).search("picture 1", 3)) == 3
    assert verify(path) == []


@pytest.fixture
def half_built(path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store whose first shard has new vectors; whoever built them is dead."""
    with monkeypatch.context() as patch:
        die_after(patch, shards=1)
        with pytest.raises(KeyboardInterrupt):
            run(NEW, photos, path)
    assert [s.next is not None for s in open_store(path).manifest.shards] == [True, False, False]
    return path


def die_after(patch: pytest.MonkeyPatch, shards: int) -> None:
    """Commit each shard as soon as it is written, and die when so many are."""
    commit, left = NextSpace.commit, [None] * shards

    def dying(new: NextSpace, written: Any) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        commit(new, written)

    patch.setattr(rebuild, "COMMIT_SECONDS", 0.0)
    patch.setattr(NextSpace, "commit", dying)


def meanwhile(patch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something once, while the new vectors of a shard are ready and not committed."""
    commit, acts = NextSpace.commit, [act]

    def slow(new: NextSpace, written: Any) -> None:
        while acts:
            acts.pop()()
        commit(new, written)

    patch.setattr(NextSpace, "commit", slow)


# ---------------------------------------------------------------- the whole way


@pytest.mark.parametrize("model", [NEW, THIRD], ids=["other dimensions", "the same dimensions"])
def test_a_store_gets_another_model(model: str, photos: Path, path: Path) -> None:
    report = run(model, photos, path)
    assert (report.rebuilt, report.present, report.added, report.rows) == (ROWS, ROWS, 0, ROWS)
    assert_as_embedded_anew(path, photos, model)
    again = run(model, photos, path)
    assert (again.rebuilt, again.present, again.read) == (0, ROWS, 0)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_images_are_read_from_the_sources_that_hold_them(
    kind: str, photos: Path, tmp_path: Path
) -> None:
    source, path = tmp_path / f"s.{kind}", tmp_path / "a.store"
    names = [add(photos, number).with_suffix("") for number in range(4)]
    if kind == "tar":
        files = [name.with_suffix(end) for name in names for end in (".jpg", ".json")]
        write_tar(source, [(file.name, file.read_bytes()) for file in files])
    else:
        images = [name.with_suffix(".jpg").read_bytes() for name in names]
        pq.write_table(pa.table({"image": images, "caption": [n.name for n in names]}), source)
    run(OLD, source, path)
    source.rename(tmp_path / "moved")
    told = refusal(NEW, photos, path)
    assert f"4 of 4 rows cannot be embedded with {NEW}" in told
    assert f"{source}#" in told
    assert "no source that was given has it" in told
    (tmp_path / "moved").rename(source)
    assert run(NEW, source, path).rebuilt == 4
    assert_as_embedded_anew(path, source)


def refusal(model: str, source: Path, path: Path) -> str:
    with pytest.raises(StoreError) as caught:
        run(model, source, path)
    assert "\n" not in str(caught.value)
    assert_still_old(path)
    return str(caught.value)


def test_images_that_no_source_names_are_read_where_they_lie(
    photos: Path, path: Path, tmp_path: Path
) -> None:
    (tmp_path / "others").mkdir()
    add(tmp_path / "others", 20)
    report = run(NEW, tmp_path / "others", path)
    assert (report.rebuilt, report.added, report.rows) == (ROWS, 1, ROWS + 1)
    run(NEW, photos, path)
    fresh = tmp_path / "both.store"
    embed(NEW, [str(photos), str(tmp_path / "others")], fresh)
    assert held(open_store(path)).keys() == held(open_store(fresh)).keys()


def test_captions_are_those_of_the_rows(photos: Path, path: Path) -> None:
    """A caption that has changed is embedded by the pass that follows, as any change."""
    add(photos, 3).with_suffix(".json").write_text('{"captions": ["other words"]}')
    report = run(NEW, photos, path)
    assert (report.rebuilt, report.changed, report.present) == (ROWS, 1, ROWS - 1)
    assert_as_embedded_anew(path, photos)


def test_deleted_rows_need_no_vectors(photos: Path, path: Path) -> None:
    names = open_store(path).column("id")
    delete(path, [names[0], names[2], names[3]])
    for name in ("000.jpg", "002.jpg", "003.jpg"):
        (photos / name).unlink()
        (photos / name).with_suffix(".json").unlink()
    assert run(NEW, photos, path).rebuilt == ROWS - 3
    assert_as_embedded_anew(path, photos)
    compact(path, now=True)
    assert_as_embedded_anew(path, photos)


def test_an_empty_store_gets_another_model(photos: Path, path: Path) -> None:
    delete(path, open_store(path).column("id"))
    report = run(NEW, photos, path)
    assert (report.rebuilt, report.added) == (0, ROWS)
    assert_as_embedded_anew(path, photos)


def test_what_happens_is_said(photos: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["embed", "--model", NEW, "--data", photos, "--out", path]
    told = call(*words).stderr
    assert (
        f"{path} holds embeddings of {OLD}: vectors of {NEW} are built beside them; searches go on "
        f"with {OLD} until all are there\n"
    ) in told
    assert f"{path} holds embeddings of {NEW} now\n" in told
    assert answer("embed", "--model", THIRD, "--data", photos, "--out", path)["rebuilt"] == ROWS


def test_an_index_is_left_behind(photos: Path, path: Path) -> None:
    write_index(path)
    told = call("embed", "--model", NEW, "--data", photos, "--out", path).stderr
    assert f"build an index of them with `mmalign index {path}`" in told
    assert open_store(path).manifest.index is None
    with pytest.raises(StoreError, match="changed while the index was built"):
        built = open_store(path).manifest
        commit_index(path, "abc", tuple(s.name for s in built.shards), OLD)


# ---------------------------------------------------------------- interrupted, and not alone


def test_a_killed_run_is_continued(
    half_built: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_still_old(half_built)
    monkeypatch.setattr(StubEncoder, "images", 0)
    told = call("embed", "--model", NEW, "--data", photos, "--out", half_built).stderr
    assert f"({PAIRS} of {ROWS} rows are done)" in told
    assert StubEncoder.images == ROWS - PAIRS
    assert_as_embedded_anew(half_built, photos)


def test_what_was_computed_stays_when_a_run_is_interrupted(
    path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = NextSpace.write

    def interrupted(new: NextSpace, shard: Any, rows: Any) -> Any:
        if shard == open_store(path).manifest.shards[-1]:
            raise KeyboardInterrupt
        return write(new, shard, rows)

    with monkeypatch.context() as patch:
        patch.setattr(NextSpace, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(NEW, photos, path)
    assert [s.next is not None for s in open_store(path).manifest.shards] == [True, True, False]
    assert_still_old(path)
    assert run(NEW, photos, path).rebuilt == PAIRS


def test_a_third_model_takes_the_place_of_the_one_that_was_begun(
    half_built: Path, photos: Path
) -> None:
    told = call("embed", "--model", THIRD, "--data", photos, "--out", half_built).stderr
    assert f"vectors of {THIRD} are built beside them, in place of those of {NEW} that" in told
    assert_as_embedded_anew(half_built, photos, THIRD)


def test_another_model_that_is_begun_meanwhile_ends_a_run(
    path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    third = model_card(stub(THIRD))
    meanwhile(monkeypatch, NextSpace(path, third).begin)
    assert f"another process has begun with {THIRD}" in refusal(NEW, photos, path)


def test_the_model_of_the_store_adds_rows_while_another_one_is_built(
    half_built: Path, photos: Path
) -> None:
    add(photos, 20)
    report = run(OLD, photos, half_built)
    assert (report.added, report.rebuilt) == (1, 0)
    assert_still_old(half_built)
    assert run(NEW, photos, half_built).rebuilt == ROWS + 1 - PAIRS
    assert_as_embedded_anew(half_built, photos)


def test_rows_change_while_they_are_embedded_again(
    path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = open_store(path).column("id")

    def others() -> None:
        delete(path, [names[1]])
        update(path, [names[2]], {"rating": 5})
        add(photos, 4, picture=40)
        add(photos, 20)
        run(OLD, photos, path)

    meanwhile(monkeypatch, others)
    run(NEW, photos, path)
    assert_as_embedded_anew(path, photos)
    (meta,) = open_store(path).rows(open_store(path).find([names[2]]), ("meta",))
    assert json.loads(meta["meta"])["rating"] == 5


def test_parts_share_the_shards(path: Path, photos: Path) -> None:
    assert {zlib.crc32(s.name.encode()) % 2 for s in open_store(path).manifest.shards} <= {0, 1}
    built = 0
    for part in ((1, 2), (2, 2)):
        report = run(NEW, photos, path, part=part)
        built += report.rebuilt
        is_last = part == (2, 2) or built == ROWS
        assert (open_store(path).manifest.model.identity == NEW) == is_last
        if is_last:
            break
        assert (report.added, report.present, report.rows) == (0, 0, ROWS)
    assert built == ROWS
    run(NEW, photos, path)
    assert_as_embedded_anew(path, photos)


def test_two_at_once_do_it_once(path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meanwhile(monkeypatch, lambda: run(NEW, photos, path))
    report = run(NEW, photos, path)
    assert (report.present, report.rows) == (ROWS, ROWS)
    assert_as_embedded_anew(path, photos)


# ---------------------------------------------------------------- images that cannot be read


@pytest.fixture
def lost(photos: Path, path: Path, tmp_path: Path) -> Path:
    """A picture that is a row of the store, and was put elsewhere."""
    return (photos / "003.jpg").rename(tmp_path / "away.jpg")


def test_a_swap_without_an_image_is_refused(
    lost: Path, photos: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["embed", "--model", NEW, "--data", photos, "--out", path]
    told = complaint(1, *words)
    place = photos / "003.jpg"
    assert f"1 of {ROWS} rows cannot be embedded with {NEW}" in told
    assert f"the first is {place}: cannot be read: No such file or directory" in told
    assert_still_old(path)
    (failure,) = open_store(path).failures()
    assert failure["uri"] == str(place)
    monkeypatch.setattr(StubEncoder, "images", 0)
    lost.rename(place)
    assert call(*words).exit_code == 0
    assert StubEncoder.images == 1, "only what was missing is computed"
    assert open_store(path).failures() == []
    assert_as_embedded_anew(path, photos)


def test_a_swap_goes_without_an_image_if_told_so(lost: Path, photos: Path, path: Path) -> None:
    place = photos / "003.jpg"
    run(NEW, photos, path, yes=True)
    store = open_store(path)
    assert store.manifest.model.identity == NEW
    vectors = held(store)["photos/003.jpg"]
    assert [len(vectors[m]) for m in ("image", "text")] == [0, 2]
    assert str(place) in [f["uri"] for f in store.failures()]
    searcher = Searcher(store, stub(NEW))
    assert len(searcher.search("picture 1", ROWS)) == ROWS - 1
    assert searcher.search("number 3", 1, to="text")[0].id == "photos/003.jpg"
    assert len(searcher.search(Row("photos/003.jpg"), ROWS)) == ROWS - 1, "by its captions"
    assert verify(path) == []
    for name in ("parquet", "npy", "hf"):
        assert call("export", path, "--to", path.with_name(name), "--format", name).exit_code == 0
    assert call("get", path, "photos/003.jpg").exit_code == 0
    assert call("index", path).exit_code == 0
    # It comes back as it was: nothing but the lack of a vector tells that it must be read.
    lost.rename(place)
    assert run(NEW, photos, path).read == 1
    assert str(place) not in [f["uri"] for f in open_store(path).failures()]
    assert_as_embedded_anew(path, photos)


def test_an_image_that_was_moved_keeps_its_row(lost: Path, photos: Path, path: Path) -> None:
    lost.rename(photos / "moved.jpg")
    (photos / "003.json").rename(photos / "moved.json")
    report = run(NEW, photos, path, yes=True)
    assert (report.moved, report.rows) == (1, ROWS)
    assert_as_embedded_anew(path, photos)


def test_another_image_is_left_to_the_pass_over_what_changed(photos: Path, path: Path) -> None:
    add(photos, 3, picture=30)
    report = run(NEW, photos, path)
    assert (report.rebuilt, report.changed, report.rows) == (ROWS - 1, 1, ROWS)
    assert open_store(path).failures() == []
    assert_as_embedded_anew(path, photos)


def test_another_image_that_looks_unchanged_is_embedded_too(photos: Path, path: Path) -> None:
    """Same size, same time: without its vector a row is read whatever its stamp says."""
    file = photos / "003.jpg"
    status, content = file.stat(), bytearray(file.read_bytes())
    content[-30] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert run(NEW, photos, path).changed == 1
    assert_as_embedded_anew(path, photos)


def test_another_image_beside_the_sources_is_not_taken(
    photos: Path, path: Path, tmp_path: Path
) -> None:
    (tmp_path / "others").mkdir()
    add(tmp_path / "others", 20)
    add(photos, 3, picture=30)
    told = refusal(NEW, tmp_path / "others", path)
    assert "003.jpg: its image is another one now; no source that was given has it" in told


def test_rows_of_unknown_content_take_what_lies_there(photos: Path, tmp_path: Path) -> None:
    """Imported rows have no checksum."""
    path, file = tmp_path / "a.store", add(photos, 1)
    old = stub(OLD)
    with Writer(path, model_card(old)) as writer:
        vectors = pair_vectors(old.encode_texts(["x"])[0], old.encode_texts(["picture 1"]))
        writer.add(stores.Row("1", str(file), ("picture 1",), vectors))
    assert run(NEW, photos, path).rebuilt == 1
    assert open_store(path).manifest.model.identity == NEW


def test_text_without_its_caption_cannot_be_embedded_again(photos: Path, tmp_path: Path) -> None:
    path, file = tmp_path / "a.store", add(photos, 1)
    old = stub(OLD)
    with Writer(path, model_card(old)) as writer:
        vectors = pair_vectors(old.encode_texts(["x"])[0], old.encode_texts(["lost words"]))
        writer.add(stores.Row("1", str(file), (), vectors))
    with pytest.raises(StoreError, match="its text has no caption to be embedded again"):
        run(NEW, photos, path)
    run(NEW, photos, path, yes=True)
    assert [len(v) for v in held(open_store(path))["1"].values()] == [1, 0]


# ---------------------------------------------------------------- what else there is to a store


def test_a_search_with_the_new_model_waits_for_the_swap(half_built: Path, photos: Path) -> None:
    with pytest.raises(IdentityError) as caught:
        Searcher(open_store(half_built), stub(NEW))
    told = str(caught.value)
    assert f"holds embeddings of {OLD}, the model is {NEW}" in told
    assert "its vectors are being built beside them" in told
    follow_words = f"`mmalign embed --model {NEW} --data SRC --out {half_built}`"
    assert follow_words in told
    with pytest.raises(IdentityError, match=f"{OLD}, the model is {THIRD}: search with the model"):
        Searcher(open_store(half_built), stub(THIRD))


def test_others_are_refused_as_before(half_built: Path, tmp_path: Path, photos: Path) -> None:
    for name in (NEW, THIRD):
        with pytest.raises(IdentityError, match=f"{OLD}, the model is {name}"):
            Writer(half_built, model_card(stub(name)))
    run(NEW, photos, tmp_path / "b.store")
    with pytest.raises(IdentityError, match="only stores of the same model"):
        merge([half_built, tmp_path / "b.store"], tmp_path / "c.store")


def test_a_merged_store_has_the_current_vectors(
    half_built: Path, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "others").mkdir()
    add(tmp_path / "others", 20)
    run(OLD, tmp_path / "others", tmp_path / "b.store")
    merge([half_built, tmp_path / "b.store"], tmp_path / "c.store")
    merged = open_store(tmp_path / "c.store").manifest
    assert merged.next is None
    assert not any(shard.next for shard in merged.shards)
    assert_still_old(tmp_path / "c.store")


def test_shards_stay_as_they_are_while_vectors_are_built(half_built: Path, photos: Path) -> None:
    names = open_store(half_built).column("id")
    delete(half_built, [names[0]])
    before = open_store(half_built).manifest.shards
    compacted = call("compact", half_built, "--now")
    assert f"vectors of {NEW} are being built, so shards stay as they are" in compacted.stderr
    assert open_store(half_built).manifest.shards == before
    assert answer("info", half_built)["next"] == {"identity": NEW, "source": NEW, "rows": 1}
    assert f"next      vectors of {NEW}: 1 of 5 rows" in call("info", half_built).stdout
    # What it proposes: to complete them, or to do without them.
    follow(compacted, 0, SRC=photos)
    manifest = open_store(half_built).manifest
    assert manifest.next is None
    assert len(manifest.shards) == 1


def test_what_was_begun_can_be_dropped(half_built: Path, photos: Path) -> None:
    shard = open_store(half_built).manifest.shards[0]
    assert shard.next
    compact(half_built, now=True, drop_next=True)
    assert not (half_built / "shards" / shard.next.file.name).exists()
    assert_still_old(half_built)
    assert answer("info", half_built)["next"] is None


def test_damaged_new_vectors_cost_no_row(
    half_built: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = open_store(half_built).manifest.shards[0]
    assert shard.next
    flip(half_built / "shards" / shard.next.file.name)
    (damage,) = verify(half_built)
    assert shard.next.file.name in damage
    report = repair(half_built)
    assert (report.lost_rows, report.rows, report.lost_shards) == (0, ROWS, ())
    assert_still_old(half_built)
    assert run(NEW, photos, half_built).rebuilt == ROWS
    assert_as_embedded_anew(half_built, photos)


def test_a_damaged_swap_mixes_no_spaces(path: Path, photos: Path) -> None:
    """The rows of a generation that cannot be read have vectors of another space than all others.

    Their dimensions are the same: nothing but what their shards say tells them apart.
    """
    run(THIRD, photos, path)
    names = open_store(path).column("id")
    delete(path, [names[0]])
    add(photos, 20)
    run(THIRD, photos, path)
    after = [f for f in manifests.generations(path) if manifests.read(f).model.identity == THIRD]
    assert len(after) == 3
    for file in after:
        flip(file)
    report = repair(path)
    assert (report.saved_shards, report.lost_shards) == ((), ())
    assert open_store(path).column("id") == names[1:]
    assert_still_old(path)
    run(THIRD, photos, path)
    assert_as_embedded_anew(path, photos, THIRD)
