"""One flipped bit in any file: it is named, the store opens, and repair keeps all other rows."""

import os
import random
import shutil
from pathlib import Path

import pytest
from crash_acts import ACTS, Life, born, committing, deleting
from disk import using
from ledger import CARD, observe

from mmalign.errors import StoreError
from mmalign.store import Writer, open_store, repair, verify
from mmalign.store import manifest as manifests
from mmalign.store.failures import read_failures

FULL = os.environ.get("MMALIGN_CRASH") == "full"
FLIPS = 400 if FULL else 4
REPAIRED = 4
"""Each fourth flip is repaired."""


def test_a_flipped_bit_is_named_and_repaired(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    life = born(tmp_path / "life", "damage")
    with using(life.disk):
        for act in (deleting(["c0"]), ACTS["index"], committing({"a2": 2, "f0": 1}), ACTS["fail"]):
            act(life)
    assert verify(life.path) == []
    rng, flips = random.Random(7), 0
    files = sorted(p.relative_to(life.path) for p in life.path.rglob("*") if p.is_file())
    assert {f.parts[0] for f in files} >= {"index", "shards", "groups", "failures.jsonl"}
    for file in files:
        bits = range(8 * (life.path / file).stat().st_size)
        for flip, bit in enumerate(rng.sample(bits, min(FLIPS, len(bits)))):
            flips += 1
            try:
                assert_named(life, file, bit)
                if flip % REPAIRED == 0:
                    copy = life.copy(tmp_path / "copy")
                    with using(copy.disk):
                        copy.disk.flip(copy.path / file, bit)
                        assert_repaired(copy, file)
                    shutil.rmtree(tmp_path / "copy")
            except BaseException as error:
                error.add_note(f"bit {bit} of {file}")
                raise
    if FULL:
        with capsys.disabled():
            print(f"\n{flips:7} bits flipped in {len(files)} files")


def assert_named(life: Life, file: Path, bit: int) -> None:
    life.disk.flip(life.path / file, bit)
    damage = verify(life.path)
    assert damage
    # A line of failures.jsonl may have become two.
    assert len(damage) == 1 or file.suffix == ".jsonl"
    assert all(line.startswith(f"{life.path / file}: ") for line in damage)
    open_store(life.path)
    life.disk.flip(life.path / file, bit)


def assert_repaired(life: Life, file: Path) -> None:
    assert life.ledger.state
    shards = manifests.newest(life.path).shards
    if file == Path(manifests.generations(life.path)[0].name):
        # What only it names must not be built over.
        with pytest.raises(StoreError, match="repair"):
            Writer(life.path, CARD)
    report = repair(life.path)
    assert verify(life.path) == []
    state = observe(life.path, thumbnails="thumbnails" not in file.name)
    lost = {i: v for i, v in life.ledger.rows.items() if i not in state.rows}
    assert state.rows.items() <= life.ledger.rows.items()
    if file.name in {f.name for s in shards for f in (s.row_file, s.vector_file)}:
        assert report.lost_rows == len(lost) > 0
    else:
        assert not lost
    assert state.index in (life.ledger.state.index, None)
    listed = {f["uri"]: f["reason"] for f in read_failures(life.path)}
    same = [u for u, reason in life.ledger.failures.items() if listed.get(u) == reason]
    # One line may be gone, or two that became one.
    assert len(same) >= len(life.ledger.failures) - 2 * (file.suffix == ".jsonl")
