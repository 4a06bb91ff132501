"""What messages of the store, of export and import propose, done: each goes well afterwards."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import small_store
from command import call, follow, proposed

from mmalign import files
from mmalign.errors import StoreError, UsageError
from mmalign.store import compact, delete, open_store, verify
from mmalign.store import manifest as manifests
from mmalign.store.where import where


def filled(path: Path, count: int = 30) -> Path:
    """A store whose name needs quotes, with a field that is a number in some rows only."""
    rows = (small_store.row(n, price=str(n) if n % 2 else n, Label="x") for n in range(count))
    small_store.fill(path / "my own.store", rows)
    return path / "my own.store"


def on_disk(store: Path) -> int:
    return sum(p.stat().st_size for p in store.rglob("*.arrow"))


# ---------------------------------------------------------------- compact


def test_the_compaction_that_is_proposed_gives_space_back_at_once(tmp_path: Path) -> None:
    store = filled(tmp_path)
    delete(store, [f"id{n}" for n in range(3)])
    done = call("compact", store)
    waiting = on_disk(store)
    assert ["compact", str(store), "--now"] in proposed(done.stderr)
    follow(done, code=0)
    assert on_disk(store) < waiting
    assert "--now" not in call("compact", store).stderr


def test_what_could_not_be_removed_goes_with_the_compaction_that_is_proposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(tmp_path)
    delete(store, ["id0"])
    mapped = store / "shards" / open_store(store).manifest.shards[0].row_file.name
    unlink = files.Disk.unlink

    def refusing(disk: files.Disk, path: Path) -> None:
        if path == mapped:
            raise PermissionError(13, "The process cannot access the file", str(path))
        unlink(disk, path)

    with monkeypatch.context() as patch:
        patch.setattr(files.Disk, "unlink", refusing)
        done = call("compact", store, "--now")
    assert ["compact", str(store)] in proposed(done.stderr)
    assert mapped.exists()
    follow(done, code=0)
    assert not mapped.exists()


def test_a_compaction_that_was_slower_runs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, others, claim = filled(tmp_path), [1], manifests.files.claim
    delete(store, ["id0"])

    def slow_claim(path: Path, content: bytes) -> bool:
        if others:
            others.pop()
            compact(store)
        return claim(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(manifests.files, "claim", slow_claim)
        refused = call("compact", store)
    assert refused.exit_code == 1
    assert "another compaction finished first; run it again" in refused.stderr
    assert call("compact", store).exit_code == 0


def test_a_damaged_generation_is_repaired_before_a_compaction(tmp_path: Path) -> None:
    store = filled(tmp_path)
    delete(store, ["id0"])
    old = manifests.generations(store)[1]
    old.write_bytes(old.read_bytes()[:-50])
    follow(call("compact", store))
    assert call("compact", store).exit_code == 0
    assert verify(store) == []


def test_a_link_in_place_of_a_folder_is_replaced_by_the_folder(tmp_path: Path) -> None:
    store = filled(tmp_path)
    (store / "shards").rename(tmp_path / "elsewhere")
    (store / "shards").symlink_to(tmp_path / "elsewhere")
    refused = call("repair", store)
    assert "replace it by the folder itself" in refused.stderr
    (store / "shards").unlink()
    (tmp_path / "elsewhere").rename(store / "shards")
    assert call("repair", store).exit_code == 0


# ---------------------------------------------------------------- readers


def test_a_store_that_was_compacted_since_is_opened_again(tmp_path: Path) -> None:
    store = filled(tmp_path)
    late = open_store(store)
    delete(store, ["id0"])
    compact(store, now=True)
    with pytest.raises(StoreError, match="open it again"):
        late.column("id")
    assert len(open_store(store).column("id")) == 29


# ---------------------------------------------------------------- rows by SQL


@pytest.mark.parametrize(
    ("expression", "proposal", "better"),
    [
        ("lable = 'x'", "did you mean '(.*?)'", lambda was, said: was.replace("lable", said)),
        ("lowr(id) = 'id1'", "did you mean '(.*?)'", lambda was, said: was.replace("lowr", said)),
        ("price < 5", r"write (try_cast\(.*\))", lambda was, said: was.replace("price", said)),
        ('id = "id1"', "text is written in '(single quotes)'", lambda was, _: "id = 'id1'"),
    ],
)
def test_the_expression_that_is_proposed_finds_rows(
    tmp_path: Path, expression: str, proposal: str, better: Callable[[str, str], str]
) -> None:
    pytest.importorskip("duckdb", reason="rows by SQL need DuckDB")
    store = open_store(filled(tmp_path))
    with pytest.raises(UsageError) as refused:
        where(store, expression)
    said = re.search(proposal, str(refused.value))
    assert said, refused.value
    assert len(where(store, better(expression, said[1])))


# ---------------------------------------------------------------- export, import, delete


@pytest.mark.parametrize("kind", ["parquet", "hf"])
def test_pictures_go_into_the_formats_that_are_proposed(tmp_path: Path, kind: str) -> None:
    store = filled(tmp_path)
    words = ["export", store, "--thumbnails", "--to", tmp_path / "out", "--format"]
    refused = call(*words, "npy")
    assert refused.exit_code == 2
    assert kind in refused.stderr.split("use ")[1]
    assert call(*words, kind).exit_code == 0


def test_an_export_goes_to_a_place_where_nothing_is(tmp_path: Path) -> None:
    store = filled(tmp_path)
    (tmp_path / "out").mkdir()
    refused = call("export", store, "--to", tmp_path / "out", "--format", "npy")
    assert "already exists; use another --to" in refused.stderr
    again = call("export", store, "--to", tmp_path / "out" / "new", "--format", "npy")
    assert again.exit_code == 0


def test_an_import_names_the_model_that_made_the_vectors(
    store: Path, run: Path, tmp_path: Path
) -> None:
    parts = tmp_path / "parts"
    assert call("export", store, "--to", parts, "--format", "npy").exit_code == 0
    (images,) = (parts / "img_emb").iterdir()
    whole = np.load(images)
    words = ["import", parts, "--out", tmp_path / "b.store", "--model", run]
    np.save(images, whole[:, :64])
    for texts in (parts / "text_emb").iterdir():
        np.save(texts, np.load(texts)[:, :64])
    refused = call(*words)
    assert refused.exit_code == 1
    assert "give the model that made these vectors" in refused.stderr
    assert not (tmp_path / "b.store").exists()
    shutil.rmtree(parts)
    assert call("export", store, "--to", parts, "--format", "npy").exit_code == 0
    assert call(*words).exit_code == 0


def test_embeddings_of_another_model_go_into_a_new_store(
    scenes: Path, run: Path, tmp_path: Path
) -> None:
    store = filled(tmp_path)
    words = ["embed", "--model", run, "--data", scenes, "--out"]
    refused = call(*words, store)
    assert refused.exit_code == 1
    assert "embed into a new store" in refused.stderr
    assert call(*words, tmp_path / "new.store").exit_code == 0


def test_rows_are_deleted_by_ids_or_by_sql(tmp_path: Path) -> None:
    store = filled(tmp_path)
    refused = call("delete", store, "id1", "--where", "id = 'id2'")
    assert refused.exit_code == 2
    assert "either the ids of the rows to delete or --where: both were given" in refused.stderr
    assert call("delete", store, "id1").exit_code == 0
    assert call("delete", store, "--where", "id = 'id2'").exit_code == 0
