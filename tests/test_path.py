"""The whole path on drawn scenes: train, embed, index, search, evaluate; killed and run again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmalign import Searcher, load_model, open_store
from mmalign.cli.demo import FEW_PASSES, demo
from mmalign.data.scenes import sample, write_scenes
from mmalign.embedding.embed import embed
from mmalign.errors import DataError, IdentityError, StoreError, UsageError
from mmalign.evaluation.evaluate import evaluate
from mmalign.model import new_model, save_model
from mmalign.search.build import build_index
from mmalign.store import delete


@pytest.mark.slow
def test_demo_leaves_everything_it_promises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = demo(tmp_path / "demo", scenes=300, minutes=0.02, held_out=100)
    names = {p.name for p in (tmp_path / "demo").iterdir()}
    assert {"run", "scenes.store", "sheet.png", "report.json"} <= names
    assert json.loads((tmp_path / "demo" / "report.json").read_text()) == report
    assert report["recall"]["chinese"]["images"] == 100
    assert report["recall"]["english"]["captions"] == 400
    assert ("was seen only" in capsys.readouterr().err) == (report["passes"] < FEW_PASSES)
    with Image.open(tmp_path / "demo" / "sheet.png") as sheet:
        assert sheet.width > 800
    store = open_store(tmp_path / "demo" / "scenes.store")
    assert len(store) == 100
    assert store.manifest.index is not None
    with pytest.raises(UsageError, match="already contains a demo"):
        demo(tmp_path / "demo")


def test_a_demo_writes_nothing_into_a_folder_of_other_things(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(UsageError, match="is not empty: delete it, or use another --out"):
        demo(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.json"]


def test_scenes_are_the_same_every_time() -> None:
    assert sample(5, 7) == sample(5, 7)
    assert sample(5, 7) != sample(5, 8)
    captions = sample(5, 7)["json"]
    assert isinstance(captions, dict)
    assert [len(set(captions[k])) for k in ("captions", "captions_zh")] == [4, 4]


def test_embedding_twice_adds_nothing(run: Path, scenes: Path, store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.store"
    shutil.copytree(store, copy)
    generation = open_store(copy).manifest.generation
    report = embed(run, [str(scenes)], copy, caption_keys=("captions", "captions_zh"))
    assert (report.added, report.present, report.rows) == (0, 96, 96)
    assert open_store(copy).manifest.generation == generation


@pytest.mark.slow
def test_embedding_more_adds_only_what_is_new(run: Path, scenes: Path, tmp_path: Path) -> None:
    out, more = tmp_path / "s.store", tmp_path / "more.tar"
    write_scenes(more, 10, seed=8, tick=lambda: None)
    embed(run, [str(scenes)], out)
    build_index(out)
    report = embed(run, [str(scenes), str(more)], out)
    assert (report.added, report.present) == (10, 96)
    store = open_store(out)
    assert len(set(store.column("id"))) == 106
    # Found at once, though the index was built before.
    caption = store.rows([100], ("captions",))[0]["captions"][0]
    hits = Searcher.open(out).search(caption, k=106)
    assert "more/000004" in [h.id for h in hits]


@pytest.mark.slow
def test_embedding_that_is_killed_goes_on(run: Path, store: Path, tmp_path: Path) -> None:
    scenes, out = tmp_path / "many.tar", tmp_path / "killed.store"
    write_scenes(scenes, 400, seed=4, tick=lambda: None)
    code = (
        "import sys; from mmalign.embedding import embed, work; work.COMMIT_SECONDS = 0.0\n"
        "embed.embed(sys.argv[1], [sys.argv[2]], sys.argv[3], precision='float32')"
    )
    call = [sys.executable, "-c", code, str(run), str(scenes), str(out)]
    process = subprocess.Popen(call, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(out.glob("manifest-*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    acknowledged = open_store(out).column("id")
    assert 0 < len(acknowledged) < 400
    embed(run, [str(scenes)], out, precision="float32")
    embed(run, [str(scenes)], tmp_path / "unbroken.store", precision="float32")
    killed, unbroken = open_store(out), open_store(tmp_path / "unbroken.store")
    assert sorted(killed.column("id")) == sorted(unbroken.column("id"))
    assert set(acknowledged) <= set(killed.column("id"))
    a, b = (
        dict(zip(s.column("id"), np.concatenate(s.vectors("image")), strict=True))
        for s in (killed, unbroken)
    )
    assert all(np.allclose(a[i], b[i], atol=2e-3) for i in a)


def test_deleted_rows_are_found_no_more(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.store"
    shutil.copytree(store, copy)
    row = open_store(copy).rows([17], ("id", "captions"))[0]
    delete(copy, [row["id"]])
    searcher = Searcher.open(copy)
    caption = row["captions"][1]
    assert row["id"] not in [h.id for h in searcher.search(caption, k=96)]
    assert len(searcher.search(caption, k=96)) == 95
    to_text = searcher.search(caption, k=9, to="text")
    assert len(to_text) == 9
    assert row["id"] not in [h.id for h in to_text]
    assert all(h.caption in h.captions for h in to_text)
    delete(copy, open_store(copy).column("id"))
    with pytest.raises(StoreError, match="no image vectors to search"):
        Searcher.open(copy).search(caption)


@pytest.mark.parametrize("exact", [False, True])
def test_rows_are_chosen_by_sql(store: Path, exact: bool) -> None:
    searcher = Searcher.open(store)
    ids = searcher.store.column("id")
    wanted = f"id in ('{ids[3]}', '{ids[40]}', '{ids[41]}')"
    hits = searcher.search("a red circle", k=10, where=wanted, exact=exact)
    assert {h.id for h in hits} == {ids[3], ids[40], ids[41]}
    to_text = searcher.search("a red circle", k=96, to="text", where=wanted, exact=exact)
    assert {h.id for h in to_text} == {ids[3], ids[40], ids[41]}
    assert not searcher.search("a red circle", where="id = 'nobody'")
    with pytest.raises(UsageError, match="captoins.*did you mean 'captions'"):
        searcher.search("a red circle", where="len(captoins) > 2")


def pictures(folder: Path, count: int = 6) -> Path:
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (40, 40), (40 * i % 256, (200 - 30 * i) % 256, 9 * i)).save(
            folder / f"{i}.png"
        )
        (folder / f"{i}.txt").write_text(f"colour {i}")
    return folder


def test_what_changed_is_embedded_again(run: Path, tmp_path: Path) -> None:
    folder, out = pictures(tmp_path / "f"), tmp_path / "s.store"
    assert embed(run, [str(folder)], out, precision="float32").added == 6
    before = np.concatenate(open_store(out).vectors("image"))
    # Touched only: its content is looked at and found unchanged.
    os.utime(folder / "0.png", (1, 1))
    Image.new("RGB", (40, 40), "white").save(folder / "1.png")
    (folder / "2.txt").write_text("another word")
    # The same size and time, and other pixels: only --checksum sees it.
    status, content = (folder / "3.png").stat(), (folder / "3.png").read_bytes()
    swapped = (folder / "4.png").read_bytes()
    assert len(swapped) == len(content)
    (folder / "3.png").write_bytes(swapped)
    os.utime(folder / "3.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    report = embed(run, [str(folder)], out, precision="float32")
    assert (report.changed, report.encoded, report.present, report.rows) == (2, 1, 4, 6)
    report = embed(run, [str(folder)], out, checksum=True, precision="float32")
    assert (report.changed, report.encoded, report.present, report.rows) == (1, 0, 5, 6)
    store = open_store(out)
    now = np.concatenate(store.vectors("image")).astype(np.float32)
    places = store.find([f"f/{i}.png" for i in range(6)])
    assert [bool(np.abs(now[p] - before[i]).max() < 2e-3) for i, p in enumerate(places)] == [
        True, False, True, False, True, True,
    ]  # fmt: skip
    assert store.rows([places[2]], ("captions",))[0]["captions"] == ["another word"]


def test_removed_sources_are_dropped_on_request(run: Path, tmp_path: Path) -> None:
    folder, other, out = pictures(tmp_path / "f"), pictures(tmp_path / "g"), tmp_path / "s.store"
    embed(run, [str(folder), str(other)], out)
    (folder / "0.png").unlink()
    (folder / "0.txt").unlink()
    (folder / "1.png").write_bytes(b"now unreadable")
    shutil.rmtree(other)
    assert embed(run, [str(folder)], out).removed == 0
    report = embed(run, [str(folder)], out, drop_removed=True)
    # Gone from the source that was given; what is damaged, or elsewhere, stays.
    assert (report.removed, report.failed, report.rows) == (1, 1, 11)
    assert "f/0.png" not in open_store(out).column("id")


@pytest.mark.slow
def test_parts_make_up_the_whole(run: Path, tmp_path: Path) -> None:
    folder, out = pictures(tmp_path / "f", 12), tmp_path / "s.store"
    reports = [embed(run, [str(folder)], out, part=(i, 3)) for i in (1, 2, 3)]
    assert sum(r.added for r in reports) == 12
    assert all(0 < r.added < 12 for r in reports)
    assert sorted(open_store(out).column("id")) == sorted(f"f/{i}.png" for i in range(12))
    with pytest.raises(UsageError, match="i from 1 to n"):
        embed(run, [str(folder)], out, part=(4, 3))
    with pytest.raises(UsageError, match="without --shard"):
        embed(run, [str(folder)], out, part=(1, 3), drop_removed=True)


@pytest.mark.slow
def test_eight_bits_tell_what_they_cost(
    run: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("mmalign.embedding.embed.COMPARED", 20)
    report = embed(run, [str(scenes)], tmp_path / "s.store", precision="int8")
    assert (report.added, report.precision) == (96, "int8")
    assert "int8 compared with float32: cosine of images" in capsys.readouterr().err
    # Where the first samples are all bad, the others are embedded all the same.
    folder = pictures(tmp_path / "f", 25)
    for i in range(25):
        (folder / f"a{i:02d}.jpg").write_bytes(b"no image")
        (folder / f"{i}.png").rename(folder / f"z{i}.png")
    report = embed(run, [str(folder)], tmp_path / "t.store", precision="int8")
    assert (report.added, report.failed) == (25, 50)
    assert "int8 cannot be compared with float32: none of 20" in capsys.readouterr().err


def test_a_failure_that_is_mended_is_resolved(run: Path, tmp_path: Path) -> None:
    folder, out = pictures(tmp_path / "f"), tmp_path / "s.store"
    good = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(good[:50])
    assert embed(run, [str(folder)], out).failed == 1
    assert [f["id"] for f in open_store(out).failures()] == ["f/3.png"]
    (folder / "3.png").write_bytes(good)
    report = embed(run, [str(folder)], out)
    assert (report.added, report.failed) == (1, 0)
    assert open_store(out).failures() == []


def test_search_in_all_directions(store: Path, scenes: Path, tmp_path: Path) -> None:
    searcher = Searcher.open(store)
    row = searcher.store.rows([17], ("id", "thumbnail", "captions"))[0]
    picture = tmp_path / "query.webp"
    picture.write_bytes(sample(3, 17)["png"])  # type: ignore[arg-type]
    by_image = searcher.search(picture, k=5)
    assert by_image[0].id == row["id"]
    assert by_image[0].score > 0.99
    assert [h.rank for h in by_image] == [1, 2, 3, 4, 5]
    to_text = searcher.search(row["captions"][2], k=3, to="text")
    assert to_text[0].caption == row["captions"][2]
    assert to_text[0].id == row["id"]
    by_words = searcher.search(row["captions"][0], k=200)
    assert len(by_words) == 96
    assert all(a.score >= b.score for a, b in pairwise(by_words))
    assert str(picture.with_suffix(".png")) not in [h.uri for h in by_words]


def test_scores_are_the_cosines_of_the_vectors(store: Path) -> None:
    searcher = Searcher.open(store)
    query = searcher.encode(["a large red star"])
    images = np.concatenate(searcher.store.vectors("image")).astype(np.float32)
    cosines = (images @ query[0]).tolist()
    for hit in searcher.search("a large red star", k=5):
        assert hit.score == pytest.approx(cosines[hit.row], abs=1e-5)
    assert searcher.search("a large red star", k=1)[0].score == pytest.approx(
        max(cosines), abs=1e-5
    )


def test_a_foreign_model_is_refused(store: Path, tmp_path: Path) -> None:
    save_model(new_model("nano", ["x"]), tmp_path)
    theirs = load_model(tmp_path).space
    ours = open_store(store).manifest.model.identity
    with pytest.raises(IdentityError) as caught:
        Searcher.open(store, tmp_path)
    assert theirs in str(caught.value)
    assert ours in str(caught.value)


def test_building_over_nothing_is_refused(run: Path, tmp_path: Path) -> None:
    from mmalign.store import ModelCard, Writer

    with Writer(tmp_path / "e.store", ModelCard("nano-1", "run", 128)):
        pass
    with pytest.raises(StoreError, match="no rows yet"):
        build_index(tmp_path / "e.store")


@pytest.mark.slow
def test_evaluation_counts_and_languages(run: Path, scenes: Path) -> None:
    english = evaluate(run, [str(scenes)])
    chinese = evaluate(run, [str(scenes)], caption_keys=["captions_zh"])
    assert (english["images"], english["captions"]) == (96, 384)
    assert english["image_retrieval_recall@1"] <= english["image_retrieval_recall@10"]
    assert english != chinese


def test_zero_shot_needs_known_classes(run: Path, tmp_path: Path) -> None:
    from conftest import jpeg, write_tar

    members = []
    for i in range(6):
        meta = {"captions": [f"a {'cat' if i % 2 else 'dog'}"], "label": "cat" if i % 2 else "dog"}
        members += [(f"{i}.jpg", jpeg(i)), (f"{i}.json", json.dumps(meta).encode())]
    tar = write_tar(tmp_path / "pets.tar", members)
    report = evaluate(run, [str(tar)], classes=["dog", "cat"])
    assert 0 <= report["acc1"] <= 1
    assert "mean_per_class_recall" in report
    with pytest.raises(DataError, match="none|no sample"):
        evaluate(run, [str(tar)], classes=["horse"])


@pytest.mark.slow
def test_the_sheet_shows_the_hits(store: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mmalign", "search", str(store), "两个红色星形", "-k", "4"]
    sheet = tmp_path / "hits.png"
    done = subprocess.run(
        [*command, "--sheet", str(sheet), "--json"], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONWARNINGS": "error::UserWarning:mmalign"},
    )  # fmt: skip
    answer = json.loads(done.stdout)
    assert answer["query"] == "两个红色星形"
    assert [h["rank"] for h in answer["hits"]] == [1, 2, 3, 4]
    assert set(answer["hits"][0]) == {"rank", "id", "score", "uri", "captions"}
    assert {"hits", "nothing_found", "index", "took_ms", "query", "read_as"} == set(answer)
    with Image.open(sheet) as drawn:
        assert drawn.height > 150
