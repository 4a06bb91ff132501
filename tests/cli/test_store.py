"""The commands that look after a store: what they print, delete, refuse, and exit with."""

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from command import answer, call, complaint
from small_store import CARD, DIM, fill, row
from store_samples import encoder_of, flip

from mmalign.store import add_failures, open_store

COUNT = 25


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """25 rows in three shards."""
    path = tmp_path / "s.store"
    fill(path, (row(n, label=("dress", "shoe")[n % 2], price=n) for n in range(COUNT)))
    return path


def ids(store: Path) -> list[str]:
    return open_store(store).column("id")  # type: ignore[no-any-return]


# ---------------------------------------------------------------- info, verify, repair, compact


def test_info_counts_what_is_live(store: Path) -> None:
    before = answer("info", store)
    assert before == {
        "rows": 25,
        "deleted": 0,
        "generation": before["generation"],
        "format": 3,
        "model": {"identity": CARD.identity, "source": CARD.source, "dim": DIM},
        "towers": {"image": "", "text": ""},
        "precision": {"unknown": 25},
        "dim": DIM,
        "captions": sum(n % 3 for n in range(COUNT)),
        "shards": 3,
        "failures": 0,
        "bytes": sum(f.stat().st_size for f in (store / "shards").iterdir()),
        "index": None,
    }
    call("delete", store, "id2", "id3")
    lost = {"id": "x", "uri": "/x.jpg", "reason": "not an image", "embedded": False}
    add_failures(store, [lost])
    after = answer("info", store)
    assert (after["rows"], after["deleted"], after["failures"]) == (23, 2, 1)
    assert after["captions"] == before["captions"] - 2
    assert after["generation"] == before["generation"] + 1
    said = call("info", store).stdout
    assert len(said.splitlines()) <= 10
    lines = dict(line.split(None, 1) for line in said.splitlines() if not line.startswith(" "))
    assert lines["rows"] == f"23, 2 more are deleted; `mmalign compact {store}` frees their space"
    assert lines["model"] == f"{CARD.identity.rsplit('-', 1)[0]}, {DIM} dimensions"
    assert lines["failures"] == "1: not an image 1"
    assert lines["captions"].startswith(f"{after['captions']}, Latin 100%")
    assert "every row is compared; `mmalign index" in lines["index"]


def test_verify_a_share_of_the_shards(store: Path) -> None:
    assert "every file matches its hash" in call("verify", store).stdout
    assert (
        "every file that was read matches its hash"
        in call("verify", store, "--sample", "0.5").stdout
    )
    files = list((store / "shards").iterdir())
    assert len(files) == 9
    for file in files:
        flip(file)
    all_of_it, share = (call("verify", store, *w, "--json") for w in ((), ("--sample", "0.3")))
    assert all_of_it.exit_code == share.exit_code == 1
    assert len(json.loads(all_of_it.stdout)["damaged"]) == 9
    assert len(json.loads(share.stdout)["damaged"]) == 3
    assert "must be above 0 and at most 1" in complaint(2, "verify", store, "--sample", "0")


def test_repair_tells_what_it_costs(store: Path) -> None:
    first = open_store(store).manifest.shards[0]
    flip(store / "shards" / first.vector_file.name)
    assert call("verify", store).exit_code == 1
    plain = call("repair", store)
    assert plain.exit_code == 0
    assert f"lost_shards: {first.name}\n" in plain.stdout
    assert answer("info", store)["rows"] == 15
    assert answer("verify", store) == {"damaged": []}
    again = answer("repair", store)
    assert (again["damage"], again["lost_rows"], again["rows"]) == ([], 0, 15)


def test_compact_gives_rows_new_numbers(store: Path) -> None:
    call("delete", store, "--yes", *(f"id{n}" for n in range(0, COUNT, 2)))
    wanted = ids(store)
    report = answer("compact", store)
    assert (report["rows"], report["deleted_rows"], report["index_dropped"]) == (12, 13, False)
    assert ids(store) == wanted
    held = answer("info", store)
    assert (held["rows"], held["deleted"], held["shards"]) == (12, 0, report["shards"])
    assert report["waiting_bytes"] > 0
    report = answer("compact", store, "--now")
    assert (report["rows"], report["waiting_bytes"]) == (12, 0)
    assert report["removed_bytes"] > 0
    assert ids(store) == wanted


# ---------------------------------------------------------------- delete


def test_delete_by_id(store: Path) -> None:
    plain = call("delete", store, "id3", "id7", "id3")
    assert plain.exit_code == 0
    assert plain.stdout.splitlines() == [
        "id3  /pictures/3.jpg",
        "id7  /pictures/7.jpg",
        f"2 deleted; {store} has 23 rows",
    ]
    assert ids(store) == [f"id{n}" for n in range(COUNT) if n not in (3, 7)]
    assert answer("delete", store, "id4") == {
        "deleted": 1,
        "dry_run": False,
        "ids": ["id4"],
        "rows": 22,
    }


def test_delete_by_sql(store: Path) -> None:
    pytest.importorskip("duckdb", reason="rows by SQL need DuckDB")
    words = ("delete", store, "--where", "label = 'dress' and price >= 2")
    wanted = [f"id{n}" for n in range(2, COUNT, 2)]
    before = open_store(store).manifest.generation
    tried = call(*words, "--dry-run").stdout.splitlines()
    assert tried[0] == "id2  /pictures/2.jpg"
    assert tried[10:] == ["... and 2 more", f"12 would be deleted; {store} has 25 rows"]
    told = answer(*words, "--dry-run")
    assert told == {"deleted": 0, "dry_run": True, "ids": wanted, "rows": 25}
    assert open_store(store).manifest.generation == before
    assert "12 of 25 rows would be deleted, more than a tenth" in complaint(1, *words)
    assert ids(store) == [f"id{n}" for n in range(COUNT)]
    words += ("--yes",)
    assert answer(*words) == {"deleted": 12, "dry_run": False, "ids": wanted, "rows": 13}
    assert ids(store) == ["id0", *(f"id{n}" for n in range(1, COUNT, 2))]
    # Nothing is left to delete, and no generation is made of nothing.
    assert answer(*words)["deleted"] == 0
    assert open_store(store).manifest.generation == before + 1


@pytest.mark.parametrize(
    ("code", "words", "said"),
    [
        (2, [], "either the ids of the rows to delete or --where: neither was given"),
        (
            2,
            ["id1", "--where", "true"],
            "the ids of the rows to delete or --where: both were given",
        ),
        (1, ["id1", "nope", "id99"], "no row has the id 'nope', 'id99'; nothing was deleted"),
        (2, ["--where", "labl = 'x'"], "called 'labl': did you mean 'label'?"),
        (2, ["--where", "label ="], "where 'label =': not a SQL expression"),
        (2, ["--where", "true; drop table rows"], "not a SQL expression"),
        (2, ["--where", ""], "it is empty"),
    ],
)
def test_what_is_not_deleted(store: Path, code: int, words: list[str], said: str) -> None:
    if "--where" in words:
        pytest.importorskip("duckdb", reason="rows by SQL need DuckDB")
    assert said in complaint(code, "delete", store, *words)
    assert len(open_store(store)) == COUNT


# ---------------------------------------------------------------- export, import


def test_export_prints_one_object(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("duckdb", reason="rows by SQL need DuckDB")
    out = tmp_path / "dresses.parquet"
    words = ("--to", out, "--format", "parquet", "--where", "label = 'dress'", "--thumbnails")
    told = answer("export", store, *words)
    assert told == {
        "out": str(out),
        "format": "parquet",
        "rows": 13,
        "captions": sum(n % 3 for n in range(0, COUNT, 2)),
        "captions_left_out": 0,
        "bytes": out.stat().st_size,
    }
    assert "thumbnail" in pq.read_table(out).column_names
    assert f"{out}: already exists" in complaint(2, "export", store, *words)


def test_export_and_import_again(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of(CARD)
    monkeypatch.setattr("mmalign.model.load_model", lambda *_: encoder)
    parts, out = tmp_path / "parts", tmp_path / "b.store"
    plain = call("export", store, "--to", parts, "--format", "npy")
    assert plain.stdout == ""
    assert "25 rows and 16 captions in" in plain.stderr
    told = answer("import", parts, "--out", out, "--model", "run")
    assert told == {
        "added": 25,
        "present": 0,
        "failed": 0,
        "renamed": 0,
        "captions_left_out": 8,
        "rows": 25,
    }
    assert ids(out) == ids(store)
    os.unlink(parts / "text_emb" / "text_emb_0.npy")
    os.unlink(parts / "img_emb" / "img_emb_0.npy")
    said = complaint(1, "import", parts, "--out", out, "--model", "run")
    assert "img_emb: part 0 is missing" in said


@pytest.mark.parametrize(
    "words", [["repair"], ["compact"], ["delete", "x"], ["export", "--to", "x", "--format", "hf"]]
)
def test_what_is_no_store(tmp_path: Path, words: list[str]) -> None:
    command, *rest = words
    assert f"{tmp_path}: not a store" in complaint(1, command, tmp_path, *rest)
    assert list(tmp_path.iterdir()) == []


def test_words_that_are_off(store: Path, tmp_path: Path) -> None:
    said = complaint(2, "export", store, "--to", tmp_path / "x", "--format", "csv")
    assert "'csv' is not one of 'parquet', 'npy', 'hf'" in said
    said = complaint(1, "import", tmp_path, "--out", tmp_path / "x", "--model", "run")
    assert "not a folder of clip-retrieval" in said
    assert "Missing option '--model'" in complaint(2, "import", tmp_path, "--out", "x")
