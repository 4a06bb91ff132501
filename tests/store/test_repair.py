"""Damage: a flipped bit anywhere is survived, named and repaired, and costs no undamaged row."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from store_samples import CARD, fill, flip, ids_of, versions, write_index

from mmalign import files, open_store
from mmalign.errors import StoreError, UsageError
from mmalign.store import RepairReport, add_failures, compact, delete, repair, verify
from mmalign.store import manifest as manifests
from mmalign.store.groups import both

FAILED = [
    {"id": "a", "uri": "a.jpg", "reason": "truncated", "embedded": False},
    {"id": "b", "uri": "图片.jpg", "reason": "too large", "embedded": False},
]


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A store with everything in it that a store can have; nothing is damaged yet."""
    path = tmp_path / "photos.store"
    fill(path, range(40))
    write_index(path)
    delete(path, ids_of([5, 17]))
    fill(path, [8, 40, 41], version=1)
    add_failures(path, FAILED)
    assert verify(path) == []
    return path


def files_of(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file())


def files_of_shard(path: Path, number: int, role: str = "vectors") -> Path:
    """A file of a shard."""
    return path / "shards" / open_store(path).manifest.shards[number].files[role].name


# ---------------------------------------------------------------- verify


def test_verify_names_every_damage(tmp_path: Path) -> None:
    fill(tmp_path, range(30))
    assert verify(tmp_path) == []
    first, second = (files_of_shard(tmp_path, number) for number in (0, 1))
    flip(first)
    second.unlink()
    damage = verify(tmp_path)
    assert len(damage) == 2
    assert any(first.name in d and "does not match its hash" in d for d in damage)
    assert any(second.name in d and "missing" in d for d in damage)


def test_verify_reads_a_share_of_the_large_files(tmp_path: Path) -> None:
    fill(tmp_path, range(40), rows_per_shard=1)
    for file in tmp_path.glob("shards/*"):
        flip(file)
    count = len(list(tmp_path.glob("shards/*")))
    assert len(verify(tmp_path)) == count > 100
    assert len(verify(tmp_path, sample=0.25)) == count // 4
    assert len(verify(tmp_path, sample=0.001)) == 1
    flip(manifests.generations(tmp_path)[0])
    assert len(verify(tmp_path, sample=0.001)) == 2
    for sample in (0, 1.5, float("nan")):
        with pytest.raises(UsageError, match="must be above 0 and at most 1"):
            verify(tmp_path, sample)


def test_a_cut_shard_is_refused_by_name(tmp_path: Path) -> None:
    fill(tmp_path, range(5))
    for role, column in (
        ("rows", "id"),
        ("vectors", "image_embedding"),
        ("thumbnails", "thumbnail"),
    ):
        file = files_of_shard(tmp_path, 0, role)
        content = file.read_bytes()
        for size in (0, 7, 100, len(content) - 10):
            file.write_bytes(content[:size])
            with pytest.raises(StoreError, match=file.name):
                open_store(tmp_path).column(column)
        file.write_bytes(content)


@pytest.mark.slow
def test_no_flipped_bit_of_a_shard_ends_the_process(tmp_path: Path) -> None:
    """What Arrow reads is checked first: a shard is refused, or all of it can be read."""
    fill(tmp_path, range(4))
    names, refused = open_store(tmp_path).columns, 0
    for shard in (tmp_path / "shards").iterdir():
        good = shard.read_bytes()
        for bit in range(0, len(good) * 8, 17):
            flip(shard, bit)
            store = open_store(tmp_path)
            try:
                for name in names:
                    store.column(name)
                store.rows(range(4), names)
                store.find(["id2"])
                assert len(np.concatenate(store.vectors("image"))) == len(store.owners("image"))
                texts = np.arange(len(np.concatenate(store.vectors("text"))))
                assert (
                    len(store.owners("text")) == len(texts) == len(store.positions("text", texts))
                )
            except StoreError:
                refused += 1
            flip(shard, bit)
        assert shard.read_bytes() == good
    assert refused > 300


def test_what_a_compaction_removes_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, range(20))
    sha256, others = files.sha256, [1]

    def slow_sha256(path: Path) -> str:
        while others:
            others.pop()
            for file in [*manifests.generations(tmp_path), *tmp_path.glob("shards/*")]:
                file.unlink()
            fill(tmp_path, range(5))
        return sha256(path)

    monkeypatch.setattr(files, "sha256", slow_sha256)
    assert verify(tmp_path) == []
    assert others == []


def test_no_permission_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, range(20))
    before = files_of(tmp_path)

    def forbidden(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files, "sha256", forbidden)
    for use in (verify, repair):
        with pytest.raises(StoreError, match="cannot be read: Permission denied"):
            use(tmp_path)
    assert files_of(tmp_path) == before


def test_two_shards_that_changed_places_are_noticed(tmp_path: Path) -> None:
    fill(tmp_path, range(20))
    first, second = (files_of_shard(tmp_path, number) for number in (0, 1))
    shutil.copy(first, second)
    assert [second.name in d for d in verify(tmp_path)] == [True]


# ---------------------------------------------------------------- repair


@pytest.mark.slow
@pytest.mark.parametrize("place", [0.02, 0.3, 0.5, 0.97])
def test_a_flipped_bit_in_any_file_is_named_and_repaired(damaged: Path, place: float) -> None:
    rows = versions(open_store(damaged))
    in_shard = {
        file.name: {i for i, live in zip(store_ids(damaged, s.name), s.live, strict=True) if live}
        for s in open_store(damaged).manifest.shards
        for file in (s.row_file, s.vector_file)
    }
    for number, file in enumerate(files_of(damaged)):
        path = damaged.parent / str(number) / "photos.store"
        shutil.copytree(damaged, path)
        broken = path / file.relative_to(damaged)
        flip(broken, int(len(broken.read_bytes()) * place) * 8 + 3)
        open_store(path)
        damage = verify(path)
        assert damage, broken
        assert all(line.startswith(f"{broken}: ") for line in damage)
        report = repair(path)
        assert report.damage == tuple(damage)
        assert verify(path) == []
        lost = in_shard.get(broken.name, set())
        assert versions(open_store(path)) == {i: v for i, v in rows.items() if i not in lost}
        assert report.lost_rows == len(lost)
        assert report.rows == len(rows) - len(lost)
        assert report.index_dropped == ("index" in broken.parts or bool(lost))
        assert any(m.startswith(f"damaged/{moved_name(broken)}") for m in report.moved)
        assert all((path / m).exists() for m in report.moved)
        again = repair(path)
        assert (again.damage, again.moved, again.generation) == ((), (), report.generation)


def store_ids(path: Path, name: str) -> list[str]:
    store = open_store(path)
    ends = np.cumsum([s.rows for s in store.manifest.shards])
    (at,) = (i for i, s in enumerate(store.manifest.shards) if s.name == name)
    numbers = range(ends[at] - store.manifest.shards[at].rows, ends[at])
    return [r["id"] for r in store.rows(numbers, ("id",))]


def moved_name(file: Path) -> str:
    """What `repair` moves for a file: an index goes as a whole, of failures a copy."""
    if "index" in file.parts:
        return file.parent.name
    return "failures-" if file.name == "failures.jsonl" else file.name


def test_lost_rows_are_listed(damaged: Path) -> None:
    first, second, *_ = open_store(damaged).manifest.shards
    flip(damaged / "shards" / first.row_file.name, 8 * (first.row_file.bytes - 30))
    (damaged / "shards" / second.row_file.name).unlink()
    report = repair(damaged)
    assert set(report.lost_shards) == {first.name, second.name}
    assert report.lost_rows == 8 + 9
    # The first has lost its footer only; of the second nothing is left.
    assert report.listed_rows == 8
    lost = [f for f in open_store(damaged).failures() if "lost" in f["reason"]]
    assert [f["id"] for f in lost] == ids_of([0, 1, 2, 3, 4, 6, 7, 9])
    assert lost[0]["uri"] == "/pictures/0.jpg"
    assert lost[0]["reason"] == f"lost: shard {first.name} damaged"
    # Added again, they are rows as before.
    fill(damaged, range(20), version=2)
    assert len(open_store(damaged)) == 42
    assert verify(damaged) == []


def test_a_shard_that_only_a_damaged_generation_names_is_saved(tmp_path: Path) -> None:
    """Whatever it is that cannot be read of the generation, half of the name of its group too."""
    for number, what in enumerate(("first half", "second half", '"groups"', '"dim"', '"previous"')):
        path = tmp_path / str(number)
        fill(path, range(15))
        fill(path, [3, 20, 21], version=1)
        rows = versions(open_store(path))
        (name,) = [s.name for s in open_store(path).manifest.shards[-1:]]
        newest = manifests.generations(path)[0]
        group, content = manifests.read(newest).groups[-1], newest.read_bytes()
        place = content.index(group.encode()) + (5 if number == 0 else 40)
        flip(newest, 8 * (place if "half" in what else content.index(what.encode()) + 2))
        assert len(open_store(path)) == 15
        report = repair(path)
        assert report.saved_shards == (name,)
        assert versions(open_store(path)) == rows
        assert verify(path) == []


def test_what_a_killed_writer_left_is_not_saved(tmp_path: Path) -> None:
    fill(tmp_path, range(15))
    shutil.copy(next(tmp_path.glob("shards/*")), tmp_path / "shards" / "0123456789abcdef.arrow")
    flip(manifests.generations(tmp_path)[0])
    repair(tmp_path)
    assert versions(open_store(tmp_path)) == dict.fromkeys(ids_of(range(15)), 0)


def test_deletions_of_a_damaged_generation_hold(tmp_path: Path) -> None:
    fill(tmp_path, range(35))
    delete(tmp_path, ids_of([2, 12, 22, 32]))
    rows = versions(open_store(tmp_path))
    newest = manifests.generations(tmp_path)[0]
    flip(newest, newest.read_bytes().index(b"somewhere") * 8)
    assert len(open_store(tmp_path)) == 35
    repair(tmp_path)
    assert versions(open_store(tmp_path)) == rows


def test_damaged_thumbnails_cost_no_row(damaged: Path) -> None:
    rows = versions(open_store(damaged))
    file = files_of_shard(damaged, 0, "thumbnails")
    flip(file)
    report = repair(damaged)
    assert (report.lost_shards, report.lost_rows) == ((), 0)
    assert f"damaged/{file.name}" in report.moved
    store = open_store(damaged)
    assert versions(store) == rows
    assert store.manifest.index is not None
    assert store.rows([1, 2], ("thumbnail",)) == [{"thumbnail": b""}] * 2
    assert verify(damaged) == []


def test_one_damaged_file_of_a_group_is_written_anew_from_the_other(damaged: Path) -> None:
    rows = versions(open_store(damaged))
    for group in open_store(damaged).manifest.groups:
        for path in both(damaged / "groups", group):
            path.unlink()
            assert versions(open_store(damaged)) == rows
            assert repair(damaged).damage == (f"{path}: missing",)
            assert verify(damaged) == []


def test_a_group_that_is_gone_makes_its_generations_unreadable(tmp_path: Path) -> None:
    fill(tmp_path, range(10))
    fill(tmp_path, range(10, 20))
    for path in both(tmp_path / "groups", open_store(tmp_path).manifest.groups[-1]):
        path.unlink()
    assert open_store(tmp_path).column("id") == ids_of(range(10))
    with pytest.raises(StoreError, match=r"a group is missing; first run `mmalign repair"):
        fill(tmp_path, range(30, 35))
    repair(tmp_path)
    fill(tmp_path, range(30, 35))
    assert verify(tmp_path) == []


def test_a_damaged_compaction_doubles_nothing(tmp_path: Path) -> None:
    fill(tmp_path, range(35))
    delete(tmp_path, ids_of([2, 12, 22, 32]))
    rows = versions(open_store(tmp_path))
    compact(tmp_path, rows_per_shard=10)
    flip(manifests.generations(tmp_path)[0])
    repair(tmp_path)
    assert versions(open_store(tmp_path)) == rows
    assert verify(tmp_path) == []


def test_a_shard_and_the_generation_that_names_it_are_both_damaged(tmp_path: Path) -> None:
    fill(tmp_path, range(15))
    shard = files_of_shard(tmp_path, -1, "rows")
    flip(shard, 8 * (shard.stat().st_size - 30))
    newest = manifests.generations(tmp_path)[0]
    flip(newest, 8 * newest.read_bytes().index(b"somewhere"))
    report = repair(tmp_path)
    assert any(line.startswith(f"{shard}: named by a damaged") for line in report.damage)
    assert f"damaged/{shard.name}" in report.moved
    assert open_store(tmp_path).column("id") == ids_of(range(10))
    assert verify(tmp_path) == []


def test_a_row_written_while_repairing_is_kept(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_store(damaged).manifest.shards[0]
    flip(damaged / "shards" / first.vector_file.name)
    claim, others = manifests.files.claim, [lambda: fill(damaged, [60, 61], version=1)]

    def slow_claim(path: Path, content: bytes) -> bool:
        if others:
            others.pop()()
        return claim(path, content)

    # The other writer must not read the damaged shard: it knows its ids already.
    monkeypatch.setattr(manifests.files, "claim", slow_claim)
    report = repair(damaged)
    assert report.lost_shards == (first.name,)
    found = versions(open_store(damaged))
    assert {"id60", "id61"} <= set(found)
    assert len(found) == 30 + 2 + 2
    assert verify(damaged) == []


def test_a_whole_store_is_left_alone(damaged: Path) -> None:
    before = {f: f.read_bytes() for f in files_of(damaged)}
    report = repair(damaged)
    manifest = open_store(damaged).manifest
    assert report == RepairReport(manifest.generation, 40, (), (), 0, 0, (), False, ())
    assert {f: f.read_bytes() for f in files_of(damaged)} == before


def test_nothing_can_be_repaired_without_a_generation(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    for file in manifests.generations(tmp_path):
        file.write_bytes(b"")
    for use in (verify, repair):
        with pytest.raises(StoreError, match="no generation can be read"):
            use(tmp_path)


# ---------------------------------------------------------------- failures


def test_the_last_word_on_a_failure_counts(tmp_path: Path) -> None:
    fill(tmp_path, range(1))
    assert open_store(tmp_path).failures() == []
    assert add_failures(tmp_path, FAILED) == 2
    assert open_store(tmp_path).failures() == FAILED
    # What is listed already is not listed again, and what never was need not be resolved.
    gone = {"id": "c", "uri": "c.jpg", "reason": None, "embedded": True}
    later = [{**FAILED[0], "reason": None}, {**FAILED[1], "reason": "still too large"}, gone]
    assert add_failures(tmp_path, FAILED) == 0
    assert add_failures(tmp_path, later) == 2
    assert open_store(tmp_path).failures() == [later[1]]
    assert add_failures(tmp_path, FAILED[:1]) == 1
    assert [f["uri"] for f in open_store(tmp_path).failures()] == ["a.jpg", "图片.jpg"]
    assert len((tmp_path / "failures.jsonl").read_text(encoding="utf-8").splitlines()) == 5
    assert verify(tmp_path) == []


def test_any_name_of_a_file_can_fail(tmp_path: Path) -> None:
    fill(tmp_path, range(1))
    odd = {**FAILED[0], "uri": 'half\udce9\n"quoted"\t图'}
    add_failures(tmp_path, [odd])
    assert open_store(tmp_path).failures() == [odd]
    assert verify(tmp_path) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line[:-20],
        lambda line: line.replace("truncated", "truncatee"),
        lambda line: json.dumps({k: v for k, v in json.loads(line).items() if k != "check"}),
        lambda line: "null",
        lambda line: "7",
        lambda line: "\x00" * 30,
    ],
)
def test_a_bad_line_is_named_and_costs_no_other(
    tmp_path: Path, damage: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path, range(1))
    add_failures(tmp_path, FAILED)
    file = tmp_path / "failures.jsonl"
    first, second = file.read_text(encoding="utf-8").splitlines()
    file.write_text(f"{second}\n{damage(first)}", encoding="utf-8")
    add_failures(tmp_path, [{**FAILED[0], "uri": "d.jpg"}])
    assert [f["uri"] for f in open_store(tmp_path).failures()] == ["图片.jpg", "d.jpg"]
    assert "failures.jsonl: lines that cannot be read: 1" in capsys.readouterr().err
    assert [line.startswith(f"{file}: line 2: ") for line in verify(tmp_path)] == [True]
    repair(tmp_path)
    assert verify(tmp_path) == []
    assert [f["uri"] for f in open_store(tmp_path).failures()] == ["图片.jpg", "d.jpg"]


def test_the_card_stays(damaged: Path) -> None:
    flip(manifests.generations(damaged)[0])
    repair(damaged)
    assert open_store(damaged).manifest.model == CARD
