"""A store of somebody else: what its manifest names is inside of it, or nobody follows it there."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from store_samples import CARD, fill, row, write_index

from mmalign import files
from mmalign.errors import StoreError
from mmalign.search.build import build_index
from mmalign.search.searcher import Searcher
from mmalign.store import Writer, add_failures, compact, delete, open_store, repair, verify
from mmalign.store import manifest as manifests
from mmalign.store.groups import both, compressed


def forge(store: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Write the next generation with whatever an author likes, and the hash that fits it."""
    newest = manifests.generations(store)[0]
    values = json.loads(newest.read_bytes())
    groups = [json.loads((store / "groups" / f"{g}.json").read_bytes()) for g in values["groups"]]
    values["generation"] += 1
    values["shards"] = [shard for group in groups for shard in group["shards"]]
    change(values)
    if "shards" in values:
        content = json.dumps({"shards": values.pop("shards")}).encode()
        values["groups"] = [hashlib.sha256(content).hexdigest()]
        for path in both(store / "groups", values["groups"][0]):
            path.write_bytes(content)
    del values["sha256"]
    values["sha256"] = hashlib.sha256(manifests.canonical(values)).hexdigest()
    path = manifests.path_of(store, manifests.number_of(newest) + 1)
    path.write_text(json.dumps(values), encoding="utf-8")


def shard(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda held: held["shards"][0].update(values)


def file(place: int, value: object, role: str = "rows") -> Callable[[dict[str, Any]], object]:
    """Change the name, bytes or hash of a file of a shard."""
    return lambda held: held["shards"][0]["files"][role].__setitem__(place, value)


def field(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda held: held.update(values)


def beginning(**changes: Any) -> Callable[[dict[str, Any]], object]:
    """Begin with vectors of another model in the first shard."""
    card = {**asdict(CARD), "identity": "tiny-4567", "towers": [["image", "", ""]]}
    content = {"next": ["tiny-4567", "float32", "1"], "file": ["x.arrow", 1, "0" * 64], **changes}

    def change(held: dict[str, Any]) -> None:
        held["next"] = content.get("card", card)
        held["shards"][0]["files"]["next"] = content["file"]
        held["shards"][0]["next"] = content["next"]

    return change


HOSTILE = {
    "next vectors elsewhere": beginning(file=["../x.arrow", 1, "0" * 64]),
    "next vectors of no model": beginning(card=None),
    "next vectors of a third model": beginning(next=["third", "", ""]),
    "next vectors of a number": beginning(next=["tiny-4567", 1, ""]),
    "next vectors that say nothing": beginning(next=None),
    "a next model without dimensions": beginning(card={"identity": "t", "source": "", "dim": 0}),
    "a next model of no kind": beginning(card="tiny-4567"),
    "vectors of another space": shard(space="tiny-4567"),
    "vectors of a number": shard(space=4567),
    "a shard elsewhere": shard(name="../../home/id_rsa"),
    "a file elsewhere": file(0, "../../home/id_rsa"),
    "a file by an absolute path": file(0, "/etc/passwd", "vectors"),
    "a file of Windows' elsewhere": file(0, "..\\..\\x.arrow"),
    "a hidden file": file(0, ".x.arrow"),
    "a file without its ending": file(0, "x"),
    "a name that ends in a line": file(0, "x.arrow\n"),
    "a long name": file(0, "x" * 300 + ".arrow"),
    "no name": file(0, None),
    "a file too many": lambda held: held["shards"][0]["files"]["rows"].append(1),
    "no vectors": lambda held: held["shards"][0]["files"].pop("vectors"),
    "rows below zero": shard(rows=-1),
    "rows without end": shard(rows=10**15),
    "half a row": shard(rows=9.5),
    "bytes below zero": file(1, -1),
    "a hash that is a path": file(2, "../x"),
    "more deleted than there are": shard(deleted_rows=11, deleted=compressed(b"\xff\xff")),
    "deleted and not said which": shard(deleted_rows=1),
    "deletions of other rows": shard(deleted_rows=1, deleted=compressed(bytes(6))),
    "deletions without end": shard(deleted_rows=1, deleted=compressed(bytes(10**6))),
    "deletions that are not compressed": shard(deleted_rows=1, deleted="AAAAAAAA"),
    "deletions that are no base64": shard(deleted_rows=1, deleted="é"),
    "an unknown field": shard(colour="red"),
    "a shard twice": lambda held: held["shards"].append(held["shards"][0]),
    "shards that are a text": field(shards="x"),
    "a shard that is a number": field(shards=[1]),
    "no model": field(model=None),
    "no dimensions": lambda held: held["model"].update(dim=0),
    "dimensions without end": lambda held: held["model"].update(dim=10**9),
    "a truth for a number": lambda held: held["model"].update(dim=True),
    "an index elsewhere": field(index={"name": "../..", "sha256": "0" * 64}),
    "an index without a hash": field(index={"name": "abc", "sha256": ""}),
    "to remove what is elsewhere": field(removing=["shards/../../home/id_rsa"]),
    "to remove what is none of its files": field(removing=["../home"]),
    "to remove a number": field(removing=[1]),
    "made from a path": field(previous="../x"),
    "no groups": lambda held: (held.pop("shards"), held.pop("groups")),
    "a group elsewhere": lambda held: (held.pop("shards"), held.update(groups=["../x"])),
    "a modality by a path": lambda held: held["model"].update(towers=[["../x", "", ""]]),
    "a position of no kind": lambda held: held["model"].update(towers=[["image", "", "x"]]),
    "retired by a text": field(retired=[["shards/x", "y"]]),
    "no format": lambda held: held.pop("format"),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_manifest_is_refused_in_one_line(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "id_rsa").write_text("key")
    store = tmp_path / "s.store"
    fill(store, range(10))
    forge(store, change)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def add() -> None:
        with Writer(store, CARD) as writer:
            writer.add(row(77))

    acts: list[Callable[[], object]] = [
        lambda: open_store(store),
        lambda: verify(store),
        lambda: repair(store),
        lambda: compact(store),
        lambda: delete(store, ["id1"]),
        add,
    ]
    for act in acts:
        with pytest.raises(StoreError, match=r"manifest-\d{8}\.json: (not made by|format)") as told:
            act()
        assert "\n" not in str(told.value)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_what_mmalign_writes_is_not_refused(tmp_path: Path) -> None:
    fill(tmp_path, range(10))
    write_index(tmp_path)
    delete(tmp_path, ["id1", "id9"])
    forge(tmp_path, field(removing=["shards/0123456789abcdef", "index/x", "manifest-00000001"]))
    assert verify(tmp_path) == []
    assert compact(tmp_path).rows == 8


def test_a_manifest_that_is_nested_without_end_is_no_generation(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    (tmp_path / "manifest-00000099.json").write_bytes(b"[" * 1_000_000)
    assert len(open_store(tmp_path)) == 3


@pytest.mark.parametrize("content", [b"[]", b"{}", b'{"sha256": 1}', b"[" * 100_000])
def test_a_description_that_is_none_is_damage(tmp_path: Path, content: bytes) -> None:
    fill(tmp_path, range(3))
    file = write_index(tmp_path) / "index.json"
    file.write_bytes(content)
    forge(tmp_path, field(index={"name": "abc", "sha256": files.sha256(file)}))
    assert any(str(file) in line for line in verify(tmp_path))
    assert repair(tmp_path).index_dropped
    assert open_store(tmp_path).index_folder is None


def test_an_index_that_names_other_files_is_damaged(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    folder = tmp_path / "index" / "abc"
    folder.mkdir(parents=True)
    files.write_json(folder / "index.json", {"name": "abc", "sha256": {"../../x": "0" * 64}})
    held = files.sha256(folder / "index.json")
    forge(tmp_path, field(index={"name": "abc", "sha256": held}))
    (told,) = [line for line in verify(tmp_path) if "cannot belong to an index" in line]
    assert told.startswith(f"{folder / 'index.json'}: ")


@pytest.mark.parametrize("name", ["index", "shards"])
def test_nothing_is_removed_or_moved_behind_a_link(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An archive can hold links. Behind one lie folders and files with names that indexes have."""
    store, home = tmp_path / "s.store", tmp_path / "home"
    fill(store, range(3))
    (home / "documents").mkdir(parents=True)
    (home / "documents" / "letter.txt").write_text("x")
    (home / ".draft.tmp").write_text("x")
    (home / "table.arrow").write_text("x")
    if name == "shards":
        for shard in (store / "shards").iterdir():
            shard.rename(home / shard.name)
        (store / "shards").rmdir()
    (store / name).symlink_to(home)
    index = {"name": "documents", "sha256": "0" * 64}
    forge(store, field(index=index, removing=["index/documents", "shards/table"]))
    then = time.time() - 10 * 24 * 3600
    for path in [store, *store.rglob("*"), *home.rglob("*")]:
        os.utime(path, (then, then))
    before = {p: p.read_bytes() for p in home.rglob("*") if p.is_file()}
    for now in (False, True):
        compact(store, now=now)
        assert f"{store / name}: a link to another folder, so nothing is" in capsys.readouterr().err
    with pytest.raises(StoreError, match="a link to another folder; replace it"):
        repair(store)
    assert {p: p.read_bytes() for p in home.rglob("*") if p.is_file()} == before


def test_nothing_is_moved_to_or_written_behind_a_link(tmp_path: Path) -> None:
    store, home = tmp_path / "s.store", tmp_path / "home"
    fill(store, range(3))
    home.mkdir()
    (home / "profile").write_text("x")
    (store / "damaged").symlink_to(home)
    (store / "failures.jsonl").symlink_to(home / "profile")
    with pytest.raises(StoreError, match="damaged: a link to another folder"):
        repair(store)
    with pytest.raises(StoreError, match=r"failures.jsonl: a link to another file"):
        add_failures(store, [{"id": "a", "uri": "a", "reason": "torn", "embedded": False}])
    assert [(p.name, p.read_text()) for p in home.iterdir()] == [("profile", "x")]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
@pytest.mark.parametrize("name", ["shard", "manifest-00000077.json", "failures.jsonl", "index"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    fill(tmp_path, range(3))
    file = tmp_path / name
    if name == "shard":
        file = tmp_path / "shards" / open_store(tmp_path).manifest.shards[0].row_file.name
    if name == "index":
        file = write_index(tmp_path) / "index.json"
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    acts: list[Callable[[], object]] = [
        lambda: verify(tmp_path),
        lambda: repair(tmp_path),
        lambda: (open_store(tmp_path).column("id"), open_store(tmp_path).failures(), 1 / 0),
    ]
    for act in acts[: 2 if name == "index" else 3]:
        with pytest.raises((StoreError, OSError), match="not a regular file") as told:
            act()
        assert str(file) in str(told.value)


def test_an_exact_search_reads_no_file_of_an_index(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """FAISS is not safe against a hostile file; docs/search.md tells how to search without it."""
    copy = Path(shutil.copytree(store, tmp_path / "s.store"))
    write_index(copy)
    searcher = Searcher.open(copy)
    assert len(searcher.search("a red circle", 3, exact=True)) == 3
    assert "index" not in capsys.readouterr().err
    assert len(searcher.search("a red circle", 3)) == 3
    assert "index.json: not made by mmalign: KeyError: 'format'" in capsys.readouterr().err
    build_index(copy)
    assert len(Searcher.open(copy).search("a red circle", 3)) == 3
