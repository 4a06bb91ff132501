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
from mmalign.build import build
from mmalign.data.scenes import sample, write_scenes
from mmalign.demo import demo
from mmalign.embed import embed
from mmalign.errors import DataError, IdentityError, StoreError, UsageError
from mmalign.evaluate import evaluate
from mmalign.model import new_model, save_model


def test_demo_leaves_everything_it_promises(tmp_path: Path) -> None:
    report = demo(tmp_path / "demo", scenes=300, minutes=0.05)
    names = {p.name for p in (tmp_path / "demo").iterdir()}
    assert {"run", "scenes.store", "sheet.png", "report.json"} <= names
    assert json.loads((tmp_path / "demo" / "report.json").read_text()) == report
    assert report["recall"]["chinese"]["images"] == 1000
    assert report["recall"]["english"]["captions"] == 4000
    with Image.open(tmp_path / "demo" / "sheet.png") as sheet:
        assert sheet.width > 800
    store = open_store(tmp_path / "demo" / "scenes.store")
    assert len(store) == 1000
    assert store.manifest.index is not None
    with pytest.raises(UsageError, match="holds a demo already"):
        demo(tmp_path / "demo")


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


def test_embedding_more_adds_only_what_is_new(run: Path, scenes: Path, tmp_path: Path) -> None:
    out, more = tmp_path / "s.store", tmp_path / "more.tar"
    write_scenes(more, 10, seed=8, tick=lambda: None)
    embed(run, [str(scenes)], out)
    build(out)
    report = embed(run, [str(scenes), str(more)], out)
    assert (report.added, report.present) == (10, 96)
    store = open_store(out)
    assert len(set(store.column("id"))) == 106
    # Found at once, though the index was built before.
    caption = store.rows([100], ("captions",))[0]["captions"][0]
    hits = Searcher.open(out).search(caption, k=106)
    assert "more/000004" in [h.id for h in hits]


def test_embedding_that_is_killed_goes_on(run: Path, store: Path, tmp_path: Path) -> None:
    scenes, out = tmp_path / "many.tar", tmp_path / "killed.store"
    write_scenes(scenes, 400, seed=4, tick=lambda: None)
    code = (
        "import mmalign.embed as e, sys; e.COMMIT_SECONDS = 0.0\n"
        "e.embed(sys.argv[1], [sys.argv[2]], sys.argv[3])"
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
    embed(run, [str(scenes)], out)
    embed(run, [str(scenes)], tmp_path / "unbroken.store")
    killed, unbroken = open_store(out), open_store(tmp_path / "unbroken.store")
    assert sorted(killed.column("id")) == sorted(unbroken.column("id"))
    assert set(acknowledged) <= set(killed.column("id"))
    a, b = (
        dict(zip(s.column("id"), np.concatenate(s.vectors("image")), strict=True))
        for s in (killed, unbroken)
    )
    assert all(np.allclose(a[i], b[i], atol=2e-3) for i in a)


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
    query = searcher.encode("a large red star")
    images = np.concatenate(searcher.store.vectors("image")).astype(np.float32)
    cosines = (images @ query[0]).tolist()
    for hit in searcher.search("a large red star", k=5):
        assert hit.score == pytest.approx(cosines[hit.row], abs=1e-5)
    assert searcher.search("a large red star", k=1)[0].score == pytest.approx(
        max(cosines), abs=1e-5
    )


def test_a_foreign_model_is_refused(store: Path, tmp_path: Path) -> None:
    save_model(new_model("nano", ["x"]), tmp_path)
    theirs = load_model(tmp_path).identity
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
        build(tmp_path / "e.store")


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
    assert {"hits", "index", "took_ms", "query"} == set(answer)
    with Image.open(sheet) as drawn:
        assert drawn.height > 150
