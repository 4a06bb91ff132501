"""One flipped bit in any file: it is named, the store opens, and repair keeps all other rows."""

import os
import random
import shutil
from pathlib import Path

from crash_acts import ACTS, Life, born, committing, deleting
from disk import using
from ledger import observe

from mmalign.store import manifest as manifests
from mmalign.store import open_store, repair, verify
from mmalign.store.failures import read_failures

FLIPS = 400 if os.environ.get("MMALIGN_CRASH") == "full" else 4
REPAIRED = 4
"""Each fourth flip is repaired."""


def test_a_flipped_bit_is_named_and_repaired(tmp_path: Path) -> None:
    life = born(tmp_path / "life", "damage")
    with using(life.disk):
        for act in (deleting(["c0"]), ACTS["index"], committing({"a2": 2, "f0": 1}), ACTS["fail"]):
            act(life)
    assert verify(life.path) == []
    rng, flips = random.Random(7), 0
    files = sorted(p.relative_to(life.path) for p in life.path.rglob("*") if p.is_file())
    assert {f.parts[0] for f in files} >= {"index", "shards", "failures.jsonl"}
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
    print(f"\n{flips:7} bits flipped in {len(files)} files, unnamed: 0")


def assert_named(life: Life, file: Path, bit: int) -> None:
    life.disk.flip(life.path / file, bit)
    (line,) = verify(life.path)
    assert line.startswith(f"{life.path / file}: ") or file.suffix == ".jsonl"
    open_store(life.path)
    life.disk.flip(life.path / file, bit)


def assert_repaired(life: Life, file: Path) -> None:
    assert life.ledger.state
    shards = manifests.newest(life.path).shards
    report = repair(life.path)
    assert verify(life.path) == []
    state = observe(life.path)
    lost = {i: v for i, v in life.ledger.rows.items() if i not in state.rows}
    assert state.rows.items() <= life.ledger.rows.items()
    if file.name in {s.name for s in shards}:
        assert report.lost_rows == len(lost) > 0
    else:
        assert not lost
    assert state.index in (life.ledger.state.index, None)
    listed = {f["uri"]: f["reason"] for f in read_failures(life.path)}
    same = [u for u, reason in life.ledger.failures.items() if listed.get(u) == reason]
    # One line may be gone, or two that became one.
    assert len(same) >= len(life.ledger.failures) - 2 * (file.suffix == ".jsonl")
