"""Whoever commits and whoever collects garbage, interleaved at every step of both.

A step is an operation of the disk, or a look at what is there. Each of the two stops at one of its
steps while the other one goes on to the end, and everything is two days old by then: however long
somebody sleeps, what was acknowledged is there, and no generation names a file that is gone.
"""

import os
import random
import re
import shutil
import threading
from collections.abc import Callable
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import Any

import pytest
from crash_acts import ACTS, Life, age, born, committing, compacting, deleting, purging
from disk import SimulatedDisk, using
from ledger import observe

from mmalign.errors import StoreError
from mmalign.store import garbage, repair, verify
from mmalign.store import manifest as manifests

FULL = os.environ.get("MMALIGN_CRASH") == "full"
CASES = 15
"""Of some hundreds, for each pair; `make test-crash` runs all."""
COMMITTERS: dict[str, Callable[[Life], None]] = {
    "write": committing({"a1": 7, "y0": 1}),
    "delete": deleting(["a0", "b1"]),
    "index": ACTS["index"],
    "compact": compacting,
    "receive": ACTS["receive"],
    "join": ACTS["join"],
}
COLLECTORS: dict[str, Callable[[Life], None]] = {"in time": compacting, "now": purging}


class Actor(threading.Thread):
    """Does something, and can be stopped at one of its steps; final."""

    def __init__(self, act: Callable[[], None], stop: int | None) -> None:
        super().__init__(daemon=True)
        self.act, self.stop, self.steps = act, stop, 0
        self.refused: Exception | None = None
        self.failed: BaseException | None = None
        self.idle, self.go = threading.Event(), threading.Event()

    def run(self) -> None:
        try:
            self.act()
        except (StoreError, FileNotFoundError) as error:
            self.refused = error
        except BaseException as error:
            self.failed = error
        self.idle.set()

    def step(self) -> None:
        self.steps += 1
        if self.steps - 1 == self.stop:
            self.idle.set()
            self.go.wait()

    def until_it_stops(self) -> None:
        self.start()
        assert self.idle.wait(60)

    def to_its_end(self) -> None:
        self.go.set()
        self.join(60)
        assert not self.is_alive()
        if self.failed:
            raise self.failed


@pytest.fixture(autouse=True)
def _looks_are_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    looks_are_steps(monkeypatch)


def looks_are_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an actor stop behind each look at the store, too."""

    def looking(look: Callable[..., Any], *args: Any) -> Any:
        seen = look(*args)
        step()
        return seen

    for name in ("generations", "read", "require_files"):
        monkeypatch.setattr(manifests, name, partial(looking, getattr(manifests, name)))


def step(*_: object) -> None:
    actor = threading.current_thread()
    if isinstance(actor, Actor):
        actor.step()


def steps(base: Life, root: Path, act: Callable[[Life], None]) -> int:
    """Count the steps of an act that is alone."""
    life = base.copy(root)
    life.disk.before = step
    with using(life.disk):
        actor = Actor(lambda: act(life), None)
        actor.until_it_stops()
        actor.to_its_end()
    shutil.rmtree(root)
    return actor.steps


@pytest.mark.parametrize("collector", COLLECTORS)
@pytest.mark.parametrize("committer", COMMITTERS)
def test_what_is_committed_is_not_collected(tmp_path: Path, committer: str, collector: str) -> None:
    base = born(tmp_path / "life", "purge")
    acts = COMMITTERS[committer], COLLECTORS[collector]
    counts = [steps(base, tmp_path / "alone", act) for act in acts]
    cases = list(product(*map(range, counts), (False, True)))
    if not FULL:
        cases = random.Random(f"{committer} {collector}").sample(cases, CASES)
    for first, second, collector_begins in cases:
        life = base.copy(tmp_path / "both")
        life.disk.before = step
        try:
            interleave(life, acts, (first, second), collector_begins)
        except BaseException as error:
            error.add_note(f"{committer} {first}, {collector} {second}, {collector_begins}")
            raise
        shutil.rmtree(life.disk.root)


def interleave(
    life: Life, acts: tuple[Callable[[Life], None], ...], stops: tuple[int, int], swapped: bool
) -> None:
    before = life.ledger
    lives = [Life(life.disk, before), Life(life.disk, before)]
    actors = [
        Actor(partial(act, one), stop) for act, one, stop in zip(acts, lives, stops, strict=True)
    ]
    turns = actors[::-1] if swapped else actors
    with using(life.disk):
        for actor in turns:
            actor.until_it_stops()
            age(life.path)
        for actor in turns:
            actor.to_its_end()
        for actor in actors:
            # The folder of an index that nobody wrote to for a day is no longer there.
            if isinstance(actor.refused, FileNotFoundError):
                assert f"{life.path / 'index'}" in actor.refused.filename
            elif actor.refused:
                assert re.search("(run|open) it again", str(actor.refused))
        assert observe(life.path).rows == (before if actors[0].refused else lives[0].ledger).rows
        assert verify(life.path) == []


def test_a_shard_is_collected_just_before_it_is_named(tmp_path: Path) -> None:
    """Between the last look at it and the claim: the commit is refused, and nothing names it."""
    life = born(tmp_path / "life", "purge")
    look, looks = manifests.require_files, count(1)

    def looking(*args: Any) -> None:
        look(*args)
        # A receipt is looked at when it is read, and once more when it is about to be committed.
        if next(looks) == 2:
            age(life.path)
            garbage.collect(life.path)

    with using(life.disk), pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifests, "require_files", looking)
        with pytest.raises(StoreError, match="removed before it was committed; run it again"):
            committing({"a1": 7})(life)
        assert observe(life.path).rows == life.ledger.rows
        assert verify(life.path) == []


def number_free_again(life: Life) -> str:
    """Let others commit and remove the generation whose number somebody is about to claim."""
    committing({"x0": 1})(life)
    (taken,) = manifests.generations(life.path)[:1]
    committing({"x1": 1})(life)
    life.disk.unlink(taken)
    return taken.name


def test_a_number_that_is_free_again_is_no_commit(tmp_path: Path) -> None:
    """Its generation would lie below the newest, where nobody reads it."""
    life = born(tmp_path / "life", "few")
    claim, others = manifests.files.claim, [life]

    def slow_claim(path: Path, content: bytes) -> bool:
        if others:
            assert number_free_again(others.pop()) == path.name
        return claim(path, content)

    with using(life.disk), pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifests.files, "claim", slow_claim)
        mine = Life(SimulatedDisk(life.disk.root), life.ledger)
        with using(mine.disk):
            committing({"a0": 9})(mine)
        assert observe(life.path).rows == {"a0": 9, "x0": 1, "x1": 1}
        assert verify(life.path) == []


def test_what_a_damaged_generation_announced_does_not_come_back(tmp_path: Path) -> None:
    """It has names of shards in it, as a generation has that committed them."""
    life = born(tmp_path / "life", "purge")
    with using(life.disk), pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifests.files, "remove", lambda path: None)
        purging(life)
    newest = manifests.generations(life.path)[0]
    announced = [n for n in manifests.read(newest).removing if n.startswith(("shards/", "index/"))]
    assert len(announced) > 2
    newest.write_bytes(newest.read_bytes().replace(b'"dim": 8', b'"dim": 9'))
    report = repair(life.path)
    assert report.saved_shards == ()
    assert observe(life.path).rows == life.ledger.rows
    assert set(announced) <= set(manifests.newest(life.path).removing)
