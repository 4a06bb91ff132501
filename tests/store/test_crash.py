"""Whatever happens at whatever operation of the disk: nothing acknowledged is lost, nothing mixed.

Every act of `crash_acts` is taken apart into its operations on the disk. At each of them the power
goes, or the process dies and another one goes on, or the disk is full or broken, or somebody else
does something in between. `make test-crash` runs all cases, `make test` a part of them. Power cuts
that leave the same disk and the same promises are judged once.
"""

import errno
import hashlib
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from crash_acts import ACTS, ROWS_PER_SHARD, Life, age, born, committing, days_later, deleting
from disk import PowerCut, SimulatedDisk, dies_at, fails_at, using
from ledger import State, observe, row

from mmalign.errors import IdentityError, MmalignError, StoreError
from mmalign.store import Writer, compact, repair, verify
from mmalign.store import manifest as manifests
from mmalign.store.failures import read_failures

FULL = os.environ.get("MMALIGN_CRASH") == "full"
POWER_CUTS = 40 if FULL else 1
CASES: Counter[str] = Counter()
SINGLE = [name for name in ACTS if name != "damage"]
SOME = SINGLE if FULL else ["create", "replace", "fail", "compact", "repair"]


@pytest.fixture(scope="module", autouse=True)
def _report(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if FULL:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print("\n" + "\n".join(f"{number:7} {kind}" for kind, number in CASES.items()))


@contextmanager
def case(kind: str, *what: object) -> Iterator[None]:
    """Count a case, and name it where it fails."""
    CASES[kind] += 1
    try:
        yield
    except BaseException as error:
        error.add_note(f"{kind}: {' '.join(map(str, what))}")
        raise


class Seen:
    """Disks that were judged before, with what had been promised of them; final."""

    def __init__(self) -> None:
        self.digests: set[bytes] = set()

    def has(self, life: Life) -> bool:
        """Return whether an equal one was asked about before, and remember it."""
        digest = hashlib.sha256(f"{life.ledger} {life.disk.names.getstate()}".encode())
        for path in sorted(life.disk.root.rglob("*")):
            content = path.read_bytes() if path.is_file() else b"folder"
            digest.update(f"{path.relative_to(life.disk.root)} {len(content)} ".encode() + content)
        known = digest.digest() in self.digests
        self.digests.add(digest.digest())
        return known


def found(life: Life) -> State | None:
    """Read the store and hold it against what was promised."""
    promised = [life.ledger.state, *life.ledger.coming]
    if life.ledger.damaged:
        repair(life.path)
    try:
        state: State | None = observe(life.path)
    except StoreError:
        if None not in promised:
            raise
        state = None
    assert state in promised
    if state is not None:
        listed = {f["uri"]: f["reason"] for f in read_failures(life.path)}
        held, coming = life.ledger.failures, life.ledger.failures_coming
        for uri in {*listed, *held, *(u for failures in coming for u in failures)}:
            new = [failures[uri] for failures in coming if uri in failures]
            # What a repair must list, it must list before anything else.
            assert listed.get(uri) in (
                new if life.ledger.damaged and new else [held.get(uri), *new]
            )
        assert_whole(life)
    return state


def assert_whole(life: Life) -> None:
    """Nothing is damaged, but for a line that was being appended."""
    torn = f"{life.path / 'failures.jsonl'}: line"
    damage = verify(life.path)
    assert [d for d in damage if not (life.ledger.torn and d.startswith(torn))] == []


def assert_goes_on(life: Life, state: State | None) -> State:
    """Write some more, and find it."""
    before = state or State({})
    after = replace(before, rows={**before.rows, "z": 1})
    with Writer(life.path, before.model) as writer:
        writer.add(row("z", 1, before.model))
    assert observe(life.path) == after
    assert_whole(life)
    return after


def assert_no_garbage_stays(life: Life) -> None:
    """A day later, compaction removes whatever a kill has left."""
    before = observe(life.path)
    if life.ledger.torn:
        repair(life.path)
    assert verify(life.path) == []
    age(life.path)
    compact(life.path, ROWS_PER_SHARD)
    assert observe(life.path).rows == before.rows
    held = [manifests.read(file) for file in manifests.generations(life.path)]
    stored = {f.name for m in held for s in m.shards for f in s.files.values()}
    assert {p.name for p in (life.path / "shards").iterdir()} == stored
    known = {"shards", "groups", "index", "damaged", "failures.jsonl"}
    assert {p.name for p in life.path.iterdir() if not p.match("manifest-*.json")} <= known
    assert not list(life.path.rglob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("act", [a for a in SINGLE if FULL or a not in ("meanwhile", "swapped")])
def test_the_power_goes(tmp_path: Path, act: str) -> None:
    """Before every operation; whatever of the unsynced has reached the disk, or nothing of it."""
    life, seen = born(tmp_path / "life", act), Seen()

    def cut(number: int, operation: str, path: Path) -> None:
        for seed in [None, *range(POWER_CUTS)]:
            with case("power cuts", act, number, operation, path.name, "seed", seed):
                rng = None if seed is None else random.Random(f"{act} {number} {seed}")
                left = Life(life.disk.cut(tmp_path / "left", rng), life.ledger)
                CASES["different disks after power cuts"] += not (known := seen.has(left))
                with using(left.disk):
                    if not known or seed == 0:
                        assert_goes_on(left, found(left))
                    if seed == 0:
                        assert_no_garbage_stays(left)
                shutil.rmtree(tmp_path / "left")

    life.disk.before = cut
    with using(life.disk):
        ACTS[act](life)
    assert life.disk.count
    cut(life.disk.count, "end", life.path)


@pytest.mark.slow
@pytest.mark.parametrize("act", SOME)
def test_a_process_dies_and_another_goes_on(tmp_path: Path, act: str) -> None:
    """What the second one is told is done must not stand on what the first had not synced."""
    life = born(tmp_path / "life", act)

    def die(number: int, operation: str, path: Path) -> None:
        with case("deaths", act, number, operation, path.name):
            next_one = life.copy(tmp_path / "next")
            with using(next_one.disk):
                after = assert_goes_on(next_one, found(next_one))
            left = Life(next_one.disk.cut(tmp_path / "left", None), life.ledger)
            assert observe(left.path) == after
            shutil.rmtree(tmp_path / "next")
            shutil.rmtree(tmp_path / "left")

    life.disk.before = die
    with using(life.disk):
        ACTS[act](life)


@pytest.mark.slow
@pytest.mark.parametrize("act", SINGLE if FULL else ["create", "delete"])
def test_a_process_dies_and_another_does_it_again(tmp_path: Path, act: str) -> None:
    """And then the power goes, whatever the first had not synced."""
    life, seen = born(tmp_path / "life", act), Seen()

    def die(number: int, operation: str, path: Path) -> None:
        again = life.copy(tmp_path / "again")
        with using(again.disk):
            again.looked(found(again))
        again.ledger = replace(again.ledger, torn=True)

        def cut(second: int, operation: str, path: Path) -> None:
            with case("deaths, then power cuts", act, number, second):
                left = Life(again.disk.cut(tmp_path / "left", None), again.ledger)
                CASES["different disks after these"] += not (known := seen.has(left))
                with using(left.disk):
                    if not known:
                        assert_goes_on(left, found(left))
                shutil.rmtree(tmp_path / "left")

        again.disk.before = cut
        with using(again.disk):
            ACTS[act](again)
        cut(again.disk.count, "end", life.path)
        shutil.rmtree(tmp_path / "again")

    life.disk.before = die
    with using(life.disk):
        ACTS[act](life)


@pytest.mark.slow
@pytest.mark.parametrize("act", SOME)
def test_nothing_is_tidied_up_by_the_dead(tmp_path: Path, act: str) -> None:
    """A kill as the code sees it: an exception that comes again at whatever it still tries."""
    base = born(tmp_path / "life", act)
    for number in count():
        life = base.copy(tmp_path / f"{number}")
        life.disk.before = dies_at(number)
        try:
            with case("kills", act, number), using(life.disk):
                ACTS[act](life)
        except PowerCut:
            before = {p: p.stat().st_size for p in life.path.rglob("*")}
            life.disk.before = SimulatedDisk.nothing
            assert {p: p.stat().st_size for p in life.path.rglob("*")} == before
            with using(life.disk):
                assert_goes_on(life, found(life))
            shutil.rmtree(life.disk.root)
        else:
            break
    assert number == life.disk.count


ERRORS = [(errno.ENOSPC, False), (errno.EIO, True), (errno.ENOSPC, True), (errno.EIO, False)]


@pytest.mark.slow
@pytest.mark.parametrize(("code", "stays"), ERRORS if FULL else ERRORS[:2])
@pytest.mark.parametrize("act", SOME)
def test_the_disk_refuses(tmp_path: Path, act: str, code: int, stays: bool) -> None:
    """An error that says where; what was promised stands; when the disk is well again, it works."""
    base = born(tmp_path / "life", act)
    for number in count():
        with case("errors of the disk", act, number, errno.errorcode[code], stays):
            life = base.copy(tmp_path / "again")
            life.disk.before = fails_at(number, code, stays)
            refused = refusal(life, ACTS[act])
            life.disk.before = SimulatedDisk.nothing
            if refused is None and life.disk.count <= number:
                break
            with using(life.disk):
                state = found(life)
                if refused is not None:
                    life.looked(state)
                    ACTS[act](life)
                    found(life)
                left = Life(life.disk.cut(tmp_path / "left", None), life.ledger)
            with using(left.disk):
                assert_goes_on(left, found(left))
                assert_no_garbage_stays(left)
            shutil.rmtree(tmp_path / "again")
            shutil.rmtree(tmp_path / "left")
    assert number


def refusal(life: Life, act: Callable[[Life], None]) -> Exception | None:
    """Return the error that ends an act: one that a person can use."""
    try:
        with using(life.disk):
            act(life)
    except (OSError, MmalignError) as error:
        if isinstance(error, OSError) and error.filename is None:
            raise
        return error
    return None


OTHERS: dict[str, Callable[[Life], None]] = {
    "write": committing({"a1": 7, "y0": 1}),
    "delete": deleting(["a0", "b1"]),
    "index": ACTS["index"],
    "compact": ACTS["compact"],
    "purge": ACTS["purge"],
    "swap": ACTS["swap"],
    "days later": days_later,
}
"""What somebody else does meanwhile."""
PAIRS = [
    (act, other)
    for act in SINGLE
    for other in OTHERS
    # A damaged shard is neither copied nor indexed; receipts are of the model before a swap.
    if act != "create"
    and (act != "repair" or other in ("write", "delete"))
    and (act, other) != ("receive", "swap")
]
QUICK = [
    ("replace", "write"),
    ("compact", "write"),
    ("index", "compact"),
    ("few", "days later"),
    ("receive", "write"),
    ("join", "index"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("act", "other"), PAIRS if FULL else QUICK)
def test_somebody_else_comes_between(tmp_path: Path, act: str, other: str) -> None:
    """Between any two operations; both are done, or one is told that it was not."""
    base = born(tmp_path / "life", act)
    # What is left when one comes after the other, whoever is first.
    orders = [(ACTS[act], OTHERS[other]), (OTHERS[other], ACTS[act]), (OTHERS[other],)]
    *both, without = [in_turn(base, tmp_path / "turn", order).rows for order in orders]
    for number in count():
        with case("others in between", act, number, other):
            life = base.copy(tmp_path / "again")
            others = _Between(life, number, OTHERS[other])
            life.disk.before = others
            refused = refusal(life, ACTS[act])
            life.disk.before = SimulatedDisk.nothing
            if not others.done:
                break
            with using(life.disk):
                state = observe(life.path)
                # Of several commits the first ones may have been acknowledged.
                assert state.rows in ([without, life.ledger.rows] if refused else both)
                assert_goes_on(life, state)
            if refused and other != "days later":
                # A writer of the model before a swap is told so.
                assert "run it again" in str(refused) or isinstance(refused, IdentityError)
            left = Life(life.disk.cut(tmp_path / "left", None), life.ledger)
            assert observe(left.path) == replace(state, rows={**state.rows, "z": 1})
            shutil.rmtree(tmp_path / "again")
            shutil.rmtree(tmp_path / "left")
    assert number


class _Between:
    """Does something else before an operation; final."""

    def __init__(self, life: Life, number: int, other: Callable[[Life], None]) -> None:
        self.life, self.number, self.other, self.done = life, number, other, False

    def __call__(self, number: int, operation: str, path: Path) -> None:
        if number == self.number and not self.done:
            self.done = True
            self.other(Life(self.life.disk, self.life.ledger))


def in_turn(base: Life, root: Path, acts: tuple[Callable[[Life], None], ...]) -> State:
    life = base.copy(root)
    with using(life.disk):
        for act in acts:
            act(life)
        if life.ledger.damaged:
            repair(life.path)
        state = observe(life.path)
    shutil.rmtree(root)
    return state
