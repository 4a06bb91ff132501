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
        "next": None,
        "precision": {"unknown": 25},
        "dim": DIM,
        "vectors": {"image": 25, "text": sum(n % 3 for n in range(COUNT))},
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


# ---------------------------------------------------------------- list, get


def test_list_shows_a_page_of_rows(store: Path) -> None:
    call("delete", store, "id3")
    shown = call("list", store, "-k", 2, "--offset", 2)
    assert shown.stdout.splitlines() == [
        "id2  /pictures/2.jpg  a dog, 2.0, 狗",
        "id4  /pictures/4.jpg  a dog, 4.0, 狗",
    ]
    assert shown.stderr == "rows 3 to 4 of 24\n"
    every = call("list", store, "-k", 100)
    assert (len(every.stdout.splitlines()), every.stderr) == (24, "")
    assert every.stdout.splitlines()[0] == "id0  /pictures/0.jpg"
    assert call("list", store, "--offset", 30).stderr == "no rows of 24\n"


def test_list_as_json_has_captions_and_metadata(store: Path) -> None:
    pytest.importorskip("duckdb", reason="rows by SQL need DuckDB")
    told = answer("list", store, "--where", "label = 'shoe'", "-k", 1, "--offset", 2)
    assert told == {
        "rows": [
            {
                "id": "id5",
                "uri": "/pictures/5.jpg",
                "captions": ["a dog, 5.0, 狗", "a dog, 5.1, 狗"],
                "meta": {"label": "shoe", "price": 5},
            }
        ],
        "count": 12,
    }
    assert answer("list", store, "--where", "false") == {"rows": [], "count": 0}


def test_get_shows_everything_but_vectors(store: Path, tmp_path: Path) -> None:
    told = answer("get", store, "id12", "id2", "id12")["rows"]
    assert [row["id"] for row in told] == ["id12", "id2"]
    shard = open_store(store).manifest.shards[0].name
    picture = open_store(store).rows([2], ("thumbnail",))[0]["thumbnail"]
    assert told[1] == {
        "id": "id2",
        "uri": "/pictures/2.jpg",
        "captions": ["a dog, 2.0, 狗", "a dog, 2.1, 狗"],
        "meta": {"label": "dress", "price": 2},
        "stamp": "f" * 16,
        "checksum": None,
        "thumbnail_bytes": len(picture),
        "vectors": {"image": 1, "text": 2},
        "precision": None,
        "row": 2,
        "shard": shard,
    }
    call("update", store, "id2", "--set", "tags=['a', 1.5]")
    shown = call("get", store, "id2", "--thumbnail", tmp_path / "2.webp").stdout
    lines = dict(line.split(None, 1) for line in shown.splitlines() if "caption" not in line)
    assert (lines["id"], lines["meta.price"], lines["meta.tags"]) == ("id2", "2", '["a", 1.5]')
    assert "caption 2        a dog, 2.1, 狗" in shown
    assert (tmp_path / "2.webp").read_bytes() == picture


def test_get_names_what_it_cannot_give(store: Path, tmp_path: Path) -> None:
    said = complaint(1, "get", store, "id1", "nope", "id99")
    assert said.endswith(f"{store}: no row has the id 'nope', 'id99'")
    out = tmp_path / "x.webp"
    assert "has no thumbnail" in complaint(1, "get", store, "id4", "--thumbnail", out)
    assert "give one id" in complaint(2, "get", store, "id1", "id2", "--thumbnail", out)
    assert not out.exists()


# ---------------------------------------------------------------- update


def test_update_by_id_and_by_sql(store: Path) -> None:
    pytest.importorskip("duckdb", reason="rows by SQL need DuckDB")
    generation = open_store(store).manifest.generation
    words = ["--set", "label=evening dress", "--set", "size.cm=12.5", "--set", "price=null"]
    told = answer("update", store, "id2", "id14", *words)
    assert told == {"rows": 2, "shards": 2, "generation": generation + 1}
    (row,) = answer("list", store, "--where", "label = 'evening dress'", "-k", 1)["rows"]
    assert row["meta"] == {"label": "evening dress", "size": {"cm": 12.5}}
    words = ["--where", "label = 'shoe'", "--set", "new=true", "--set", 'word="null"']
    assert answer("update", store, *words)["rows"] == 12
    assert answer("list", store, "--where", "new and price < 5")["count"] == 2
    assert answer("update", store, *words)["rows"] == 0
    plain = call("update", store, "id1", "--set", "since=2020-01-31")
    assert plain.stdout.splitlines()[:2] == ["rows        1", "shards      1"]
    assert answer("get", store, "id1")["rows"][0]["meta"] == {
        "label": "shoe",
        "price": 1,
        "new": True,
        "word": "null",
        "since": "2020-01-31",
    }


@pytest.mark.parametrize(
    ("code", "words", "said"),
    [
        (2, ["--set", "a=1"], "the ids of the rows to update or --where: neither was given"),
        (2, ["id1"], "Missing option '--set'"),
        (2, ["id1", "--set", "a"], "--set a: write it as key=value"),
        (2, ["id1", "--set", "=a"], "a field without a name"),
        (2, ["id1", "--set", "captions=a"], "'captions' is a column, which cannot be updated"),
        (2, ["id1", "--set", "meta.label=a"], "fields of meta are written by their own names"),
        (1, ["id1", "nope", "--set", "a=1"], "no row has the id 'nope'; nothing was updated"),
    ],
)
def test_what_is_not_updated(store: Path, code: int, words: list[str], said: str) -> None:
    before = open_store(store).manifest.generation
    assert said in complaint(code, "update", store, *words)
    assert open_store(store).manifest.generation == before


# ---------------------------------------------------------------- merge


def test_merge_tells_what_it_did(store: Path, tmp_path: Path) -> None:
    other, out = tmp_path / "other.store", tmp_path / "all.store"
    fill(other, (row(n, label="new") for n in range(20, 30)))
    told = answer("merge", store, other, "--out", out)
    assert told == {
        "rows": 30,
        "replaced": 5,
        "shards": 4,
        "failures": 0,
        "linked": 12,
        "copied": 0,
        "generation": 1,
    }
    assert answer("verify", out) == {"damaged": []}
    assert f"{out}: already exists" in complaint(2, "merge", store, other, "--out", out)
    assert "at least two stores" in complaint(2, "merge", store, "--out", tmp_path / "x")


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
    "words",
    [
        ["repair"],
        ["compact"],
        ["delete", "x"],
        ["export", "--to", "x", "--format", "hf"],
        ["update", "x", "--set", "a=1"],
        ["list"],
        ["get", "x"],
    ],
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
