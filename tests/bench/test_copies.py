"""Real images with known near-duplicates: the files, what is measured of them, and diversity."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench import copies, diversity, duplicates
from bench.duplicates import Curves
from mmalign.arrays import Floats

ORIGINALS, CHANGED = 120, 40


def picture(number: int) -> Image.Image:
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8)).resize((90, 60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of random pictures of three classes, and the folder that a bench makes of it."""
    made = tmp_path_factory.mktemp("copies")
    source = made / "source.jsonl"
    lines = []
    for number in range(ORIGINALS):
        picture(number).save(made / f"{number}.png")
        said = {"image": f"{number}.png", "caption": f"a thing {number % 3}"}
        lines.append(json.dumps({**said, "label": f"{number % 3}"}))
    source.write_text("\n".join(lines), "utf-8")
    copies.write(str(source), made / "out" / "source", 1_000, CHANGED)
    return made


def vectors(folder: Path) -> Floats:
    """Small pictures as vectors."""
    own = folder / "out" / "source"
    small = [
        np.asarray(Image.open(own / p.file).convert("RGB").resize((6, 4), Image.Resampling.BOX))
        for p in copies.read(own)
    ]
    return (np.stack(small).reshape(len(small), -1) - np.float32(128)) / np.float32(128)


@pytest.fixture
def rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a bench records; a file of vectors is there."""
    np.save(folder / "out" / "source" / "small.npy", vectors(folder))
    recorded: list[dict[str, Any]] = []
    for module in (duplicates, diversity):
        monkeypatch.setattr(module.measure, "append", lambda name, row: recorded.append(row))
    return recorded


def test_copies_are_changed_as_their_kind_says(folder: Path) -> None:
    own = folder / "out" / "source"
    pictures = copies.read(own)
    assert [p.of for p in pictures[:ORIGINALS]] == list(range(ORIGINALS))
    assert len(pictures) == ORIGINALS + CHANGED * len(copies.KINDS)
    sizes = {"half size": (45, 30), "crop 10 %": (81, 54)}
    for p in pictures:
        with Image.open(own / p.file) as image:
            assert image.size == sizes.get(p.kind, image.size)
            assert p.kind in sizes or p.kind.startswith("crop") or image.size == (90, 60)
    first = pictures[ORIGINALS].of
    with Image.open(own / pictures[first].file) as opened:
        original = np.asarray(opened.convert("RGB"), np.float32)
    changed = {
        p.kind: np.asarray(Image.open(own / p.file).convert("RGB"), np.float32)
        for p in pictures[ORIGINALS:]
        if p.of == first and p.kind not in sizes and not p.kind.startswith("crop")
    }
    distance = {kind: float(np.abs(image - original).mean()) for kind, image in changed.items()}
    assert 0 < distance["jpeg 90"] < distance["jpeg 70"] < distance["jpeg 40"]
    assert changed["darker"].mean() < original.mean() < changed["brighter"].mean()
    assert np.abs(changed["mirrored"][:, ::-1] - original).mean() < distance["jpeg 40"]
    assert distance["jpeg 90"] < distance["watermark"] < distance["mirrored"]


def test_a_second_run_changes_nothing(folder: Path) -> None:
    listed = folder / "out" / "source" / copies.LIST
    before = listed.stat().st_mtime_ns
    copies.write("there is no such source", listed.parent, 5, 5)
    assert listed.stat().st_mtime_ns == before


def test_every_rule_is_measured_on_every_kind(folder: Path, rows: list[dict[str, Any]]) -> None:
    duplicates.main([str(folder / "out"), str(folder / "source.jsonl")])
    found = {(r["encoder"], r["rule"]): r for r in rows if "rule" in r}
    encoders = ("small", "small, centred")
    assert set(found) == {(encoder, rule) for encoder in encoders for rule in duplicates.RULES}
    search = found["small", "search"]
    assert {f"found, {kind}" for kind in copies.KINDS} <= set(search)
    assert (search["found, jpeg 90"], search["precision, jpeg 90"]) == ("1.000", "1.000")
    assert search["found, mirrored"] == "0.000"
    assert search["wrong among"] == f"0 pairs, 0 of {ORIGINALS}"
    curves = [r for r in rows if "score" in r]
    assert {r["encoder"] for r in curves} == {"small", "small, centred", "all"}
    assert all(float(r["roc"]) > 0.9 for r in curves)


def test_curves_of_a_known_order() -> None:
    scores = np.array([4.0, 3.0, 2.0, 1.0])
    right = np.array([True, False, True, False])
    curves = Curves.of(scores, right, np.ones(4))
    assert curves.roc == pytest.approx(0.75)
    assert curves.ap == pytest.approx((1 + 2 / 3) / 2)
    assert (curves.best, curves.f1) == (2.0, pytest.approx(0.8))
    equal = Curves.of(np.ones(4), right, np.ones(4))
    assert (equal.roc, equal.ap) == (pytest.approx(0.5), pytest.approx(0.5))
    assert Curves.of(scores, right, np.array([1, 1, 1, 3.0])).roc == pytest.approx(7 / 8)


def test_every_way_to_ten_hits_is_measured(
    folder: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = ["plain", "group", "diversity 0.5", "MMR 0.5, 10"]
    monkeypatch.setattr(diversity, "WAYS", {way: diversity.WAYS[way] for way in ways})
    monkeypatch.setattr(diversity, "FEWEST", 10)
    (folder / "words.txt").write_text("thing\nnothing\n", "utf-8")
    with open(folder / "out" / "source" / "small.texts", "wb") as file:
        np.save(file, vectors(folder)[:2])
    where = [str(folder / "out"), str(folder / "source.jsonl")]
    diversity.main([*where, "--truth", "label", "--texts", str(folder / "words.txt")])
    found = {(r["encoder"], r["asked"], r["way"]): r for r in rows}
    assert {(asked, way) for _, asked, way in found} == {
        (asked, way) for asked in ("images", "texts") for way in ways
    }
    assert all(0.27 < float(r["copies"]) < 0.33 for r in rows)
    told = {way: float(found["small", "images", way]["distinct"].split()[0]) for way in ways}
    assert told["plain"] == told["MMR 0.5, 10"] < told["group"]
    assert told["diversity 0.5"] > told["plain"]
    # "thing" is in every caption, "nothing" in none and not asked.
    texts = found["small", "texts", "plain"]
    assert (texts["queries"], texts["precision"].split()[0]) == ("1", "1.000")


def test_vectors_of_other_pictures_are_refused(folder: Path) -> None:
    wrong = folder / "out" / "source" / "wrong.npy"
    np.save(wrong, np.ones((3, 4), np.float32))
    try:
        with pytest.raises(SystemExit, match=r"wrong\.npy: 3 vectors, and 600 are expected"):
            duplicates.main([str(folder / "out"), str(folder / "source.jsonl")])
    finally:
        wrong.unlink()
