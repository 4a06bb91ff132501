"""Import: vectors of clip-retrieval become rows of a store, and none is lost or mixed up."""

import json
import os
import shutil
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_store import CARD, DIM, fill, row
from store_samples import encoder_of

from mmalign.errors import DataError, IdentityError
from mmalign.exchange import imports, parts
from mmalign.exchange.export import export
from mmalign.exchange.imports import import_parts
from mmalign.store import ModelCard, Store, open_store, verify

COUNT = 25


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any name loads as the model that the tiny stores say they are of."""
    encoder = encoder_of(CARD)
    monkeypatch.setattr("mmalign.model.load_model", lambda name: encoder)


def texts_of(held: Store) -> dict[str, list[np.ndarray]]:
    """Text vectors of each id."""
    ids = [r["id"] for r in held.rows(range(held.manifest.physical_rows), ("id",))]
    out: dict[str, list[np.ndarray]] = {}
    for owner, vector in zip(
        held.owners("text"), np.concatenate(held.vectors("text")), strict=True
    ):
        out.setdefault(ids[owner], []).append(vector)
    return out


def images_of(held: Store) -> dict[str, np.ndarray]:
    ids = held.rows(range(held.manifest.physical_rows), ("id",))
    vectors = np.concatenate(held.vectors("image"))
    live = np.ones(len(ids), bool) if held.live is None else held.live
    return {r["id"]: v for r, v, alive in zip(ids, vectors, live, strict=True) if alive}


def write_part(
    folder: Path,
    part: int,
    images: np.ndarray,
    table: dict[str, list[Any]],
    texts: np.ndarray | None = None,
) -> None:
    """Write a part as clip-retrieval would."""
    for kind, vectors in (("img_emb", images), ("text_emb", texts)):
        if vectors is not None:
            (folder / kind).mkdir(parents=True, exist_ok=True)
            np.save(folder / kind / f"{kind}_{part}.npy", vectors)
    (folder / "metadata").mkdir(exist_ok=True)
    pq.write_table(pa.table(table), folder / "metadata" / f"metadata_{part}.parquet")


def vectors(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)


def test_a_round_trip_keeps_ids_vectors_and_captions(tmp_path: Path) -> None:
    before = fill(tmp_path / "a.store", (row(n, n % 2, 名=f"{n}号") for n in range(COUNT)))
    export(tmp_path / "a.store", tmp_path / "parts", "npy")
    report = import_parts(tmp_path / "parts", tmp_path / "b.store", "any")
    assert (report.added, report.failed, report.renamed, report.present) == (COUNT, 0, 0, 0)
    after = open_store(tmp_path / "b.store")
    assert after.manifest.model == CARD
    for name in ("id", "uri", "captions", "meta"):
        assert after.column(name) == before.column(name)
    for get in (images_of, texts_of):
        one, two = get(before), get(after)
        assert one.keys() == two.keys()
        assert all(np.allclose(one[i], two[i], atol=2e-3) for i in one)
    assert verify(tmp_path / "b.store") == []


def test_captions_beyond_the_first_come_back_in_meta(tmp_path: Path) -> None:
    fill(tmp_path / "a.store", (row(n) for n in range(COUNT)))
    export(tmp_path / "a.store", tmp_path / "parts", "npy")
    report = import_parts(tmp_path / "parts", tmp_path / "b.store", "any")
    assert report.captions_left_out == sum(n % 3 == 2 for n in range(COUNT))
    held = open_store(tmp_path / "b.store")
    every = zip(range(COUNT), held.column("captions"), held.column("meta"), strict=True)
    for n, captions, meta in every:
        assert captions == list(row(n).captions[:1])
        assert json.loads(meta).get("captions_without_vector", []) == list(row(n).captions[1:])


def test_a_folder_of_clip_retrieval_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a tar: keys for paths, urls and numbers beside them, float16 and float32, no order."""
    for part, kind in ((10, np.float16), (9, np.float32)):
        table = {
            "image_path": [f"{part:05d}0000{i}" for i in range(3)],
            "caption": [f"a cat {part}", "", "a dog"],
            "key": [f"{part:05d}0000{i}" for i in range(3)],
            "url": [f"https://example.org/{part}/{i}.jpg" for i in range(3)],
            "width": [640, None, 320],
            "exif.date": [None, "2024-01-01", None],
        }
        scale = vectors(3, part) * 40
        write_part(tmp_path, part, scale.astype(kind), table, vectors(3, part + 50).astype(kind))
    report = import_parts(tmp_path, tmp_path / "s.store", "any")
    assert (report.added, report.rows, report.captions_left_out) == (6, 6, 0)
    held = open_store(tmp_path / "s.store")
    assert held.column("id") == [f"{p:05d}0000{i}" for p in (9, 10) for i in range(3)]
    assert held.column("uri")[4] == "https://example.org/10/1.jpg"
    assert held.column("captions") == [["a cat 9"], [], ["a dog"], ["a cat 10"], [], ["a dog"]]
    assert [json.loads(m) for m in held.column("meta")[:3]] == [
        {"width": 640},
        {"exif.date": "2024-01-01"},
        {"width": 320},
    ]
    wanted = vectors(3, 9) / np.linalg.norm(vectors(3, 9), axis=1, keepdims=True)
    assert np.allclose(np.concatenate(held.vectors("image"))[:3], wanted, atol=2e-3)
    said = capsys.readouterr().err
    assert f"using {CARD.identity} as given: the vectors have its {CARD.dim} dimensions" in said


def test_unusable_vectors_are_listed(tmp_path: Path) -> None:
    images, texts = vectors(5), vectors(5, 1)
    images[1, 3], images[2], images[3, 0] = np.nan, 0, np.inf
    texts[4] = np.nan
    table = {"image_path": [f"/p/{i}.jpg" for i in range(5)], "caption": list("abcde")}
    write_part(tmp_path, 0, images, table, texts)
    report = import_parts(tmp_path, tmp_path / "s.store", "any")
    assert (report.added, report.failed, report.captions_left_out) == (2, 3, 1)
    held = open_store(tmp_path / "s.store")
    assert held.column("id") == ["/p/0.jpg", "/p/4.jpg"]
    assert held.column("captions") == [["a"], []]
    assert json.loads(held.column("meta")[1]) == {"captions_without_vector": ["e"]}
    listed = {f["uri"]: (f["reason"], f["embedded"]) for f in held.failures()}
    image, text = (
        "the image vector is zero or not finite",
        "the text vector is zero or not finite",
    )
    assert listed == {f"/p/{i}.jpg": (image, False) for i in (1, 2, 3)} | {"/p/4.jpg": (text, True)}
    # Mended, they are added, and no longer listed as lost.
    write_part(tmp_path, 0, vectors(5), table, texts)
    report = import_parts(tmp_path, tmp_path / "s.store", "any")
    assert (report.added, report.present, report.failed) == (3, 2, 0)
    assert [f["uri"] for f in open_store(tmp_path / "s.store").failures()] == ["/p/4.jpg"]


def test_what_is_no_json_is_null_or_text_in_meta(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table: dict[str, Any] = {
        "key": ["a"],
        "price": pa.array([[float("nan")]]),
        "taken": pa.array([1_577_923_200_000_000_001], pa.timestamp("ns")),
        "cost": pa.array([Decimal("1.50")]),
        "meta": ['{"score": NaN}'],
    }
    write_part(tmp_path / "parts", 0, vectors(1), table)
    import_parts(tmp_path / "parts", tmp_path / "s.store", "any")
    (stored,) = open_store(tmp_path / "s.store").rows([0], ("meta",))
    assert json.loads(stored["meta"], parse_constant=pytest.fail) == {
        "price": [None],
        "taken": "2020-01-02 00:00:00.000000001",
        "cost": 1.5,
        "score": None,
    }
    assert "left out" not in capsys.readouterr().err


def test_equal_ids_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in (0, 1):
        paths = [f"/{part}/a.jpg", f"/{part}/b.jpg", "/same.jpg"]
        write_part(tmp_path, part, vectors(3, part), {"image_path": paths, "key": ["a", "b", "c"]})
    # A row whose own id is what another would get.
    table = {"image_path": ["/2/d.jpg", "/2/e.jpg"], "key": ["/1/a.jpg", "e"]}
    write_part(tmp_path, 2, vectors(2, 2), table)
    report = import_parts(tmp_path, tmp_path / "s.store", "any")
    assert (report.added, report.renamed, report.rows) == (8, 3, 8)
    held = open_store(tmp_path / "s.store")
    wanted = ["a", "b", "c", "1/0/a", "/1/b.jpg", "/same.jpg", "/1/a.jpg", "e"]
    assert held.column("id") == wanted
    assert "3 rows had the id of another row" in capsys.readouterr().err
    again = import_parts(tmp_path, tmp_path / "s.store", "any")
    assert (again.added, again.present, again.rows) == (0, 8, 8)
    assert open_store(tmp_path / "s.store").column("id") == wanted


def test_ids_of_a_store_that_is_there_are_not_taken(tmp_path: Path) -> None:
    fill(tmp_path / "s.store", [row(1)])
    table = {"image_path": ["/elsewhere.jpg", "/pictures/2.jpg"], "key": ["id1", "id2"]}
    write_part(tmp_path, 0, vectors(2), table)
    report = import_parts(tmp_path, tmp_path / "s.store", "any")
    assert (report.added, report.renamed, report.rows) == (2, 1, 3)
    assert open_store(tmp_path / "s.store").column("id") == ["id1", "/elsewhere.jpg", "id2"]
    assert open_store(tmp_path / "s.store").column("uri")[0] == row(1).uri


def test_an_import_that_was_stopped_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "ROWS_AT_A_TIME", 4)
    table = {"image_path": [f"/p/{i}.jpg" for i in range(20)], "key": ["k", "k"] * 10}
    write_part(tmp_path, 0, vectors(20), table)
    take, calls = imports._Importer.add_rows, []

    def stopped(*words: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        take(*words)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(imports._Importer, "add_rows", stopped)
        import_parts(tmp_path, tmp_path / "s.store", "any")
    assert len(open_store(tmp_path / "s.store")) == 8
    report = import_parts(tmp_path, tmp_path / "s.store", "any")
    assert (report.added, report.present, report.rows) == (12, 8, 20)
    held = open_store(tmp_path / "s.store")
    assert held.column("id") == ["k", *(f"/p/{i}.jpg" for i in range(1, 20))]
    wanted = vectors(20) / np.linalg.norm(vectors(20), axis=1, keepdims=True)
    assert np.allclose(np.concatenate(held.vectors("image")), wanted, atol=2e-3)


def test_captions_without_any_text_vectors_stand_in_meta(tmp_path: Path) -> None:
    write_part(tmp_path, 0, vectors(2), {"image_path": ["a.jpg", "b.jpg"], "caption": ["A", None]})
    assert import_parts(tmp_path, tmp_path / "s.store", "any").captions_left_out == 1
    held = open_store(tmp_path / "s.store")
    assert [json.loads(m) for m in held.column("meta")] == [{"captions_without_vector": ["A"]}, {}]


def test_rows_of_which_nothing_is_known_go_by_part_and_row(tmp_path: Path) -> None:
    write_part(tmp_path, 3, vectors(2), {"width": [1, 2]})
    import_parts(tmp_path, tmp_path / "s.store", "any")
    assert open_store(tmp_path / "s.store").column("id") == ["3/0", "3/1"]


def put(name: str, vectors_ND: np.ndarray) -> Callable[[Path], object]:
    """Put other vectors in the place of a file."""
    return lambda folder: np.save(folder / name, vectors_ND)


def drop(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 20)


IMAGES, TEXTS, TOLD = (
    "img_emb/img_emb_1.npy",
    "text_emb/text_emb_1.npy",
    "metadata/metadata_1.parquet",
)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (
            lambda folder: shutil.rmtree(folder / "img_emb"),
            "img_emb: part 0 is missing, but .*_0.par",
        ),
        (shutil.rmtree, "not a folder of clip-retrieval"),
        (drop(IMAGES), "img_emb: part 1 is missing"),
        (drop(TOLD), "metadata: part 1 is missing"),
        (drop(TEXTS), "text_emb: part 1 is missing"),
        (put(TEXTS, vectors(2)), "text_emb_1.npy: 2 rows, .*img_emb_1.npy has 3"),
        (put(IMAGES, vectors(4)), "metadata_1.parquet: 3 rows, .*img_emb_1.npy has 4"),
        (
            put(TEXTS, np.ones((3, 4), "f4")),
            "text_emb_1.npy: 4 dimensions, but .*img_emb_1.npy has 8",
        ),
        (put(IMAGES, np.ones((3, DIM))), "img_emb_1.npy: float64 of shape"),
        (put(IMAGES, np.ones(3, "f4")), r"img_emb_1.npy: float32 of shape \(3,\)"),
        (put(IMAGES, np.array([{}] * 3)), "img_emb_1.npy: cannot be read"),
        (cut(IMAGES), "img_emb_1.npy: cannot be read"),
        (cut(TOLD), "metadata_1.parquet: cannot be read"),
        (put("img_emb/img_emb_01.npy", vectors(3)), "img_emb_1.npy: the same part number"),
        (put("img_emb/more.npy", vectors(3)), "more.npy: its name does not end with a part number"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, harm: Callable[[Path], object], said: str
) -> None:
    folder = tmp_path / "parts"
    for part in (0, 1):
        table = {"image_path": [f"/{part}/{i}.jpg" for i in range(3)], "caption": list("abc")}
        write_part(folder, part, vectors(3), table, vectors(3, 1))
    harm(folder)
    with pytest.raises(DataError, match=said) as caught:
        import_parts(folder, tmp_path / "s.store", "any")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "s.store").exists()


def test_other_dimensions_are_another_model(tmp_path: Path) -> None:
    write_part(tmp_path, 0, np.ones((2, DIM + 1), "f4"), {"key": ["a", "b"]})
    with pytest.raises(
        IdentityError, match=f"{DIM + 1} dimensions, but {CARD.identity} makes {DIM}"
    ):
        import_parts(tmp_path, tmp_path / "s.store", "any")
    assert not (tmp_path / "s.store").exists()


def test_a_store_of_another_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "s.store", [row(1)])
    write_part(tmp_path, 0, vectors(2), {"key": ["a", "b"]})
    other = encoder_of(ModelCard("nano-9999", "x", DIM))
    monkeypatch.setattr("mmalign.model.load_model", lambda name: other)
    with pytest.raises(IdentityError, match="nano-0123.*nano-9999"):
        import_parts(tmp_path, tmp_path / "s.store", "any")
    assert len(open_store(tmp_path / "s.store")) == 1
