"""Real processes, killed at random moments: what they said was done is done, and all is whole."""

import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ledger import observe

from mmalign import open_store
from mmalign.data.scenes import write_scenes
from mmalign.embed import embed
from mmalign.store import repair, verify

FULL = os.environ.get("MMALIGN_CRASH") == "full"
KILLS = 100 if FULL else 4
LONGEST_S = 0.25
TESTS = Path(__file__).parent


@contextmanager
def worker(*words: object) -> Iterator[subprocess.Popen[str]]:
    """Run a worker; it is dead when the block ends."""
    command = [sys.executable, str(TESTS / "crash_worker.py"), *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


def kill_at_random(process: subprocess.Popen[str], rng: random.Random) -> list[str]:
    """Wait for its first word, then for a moment; return all the ids it acknowledged."""
    assert process.stdout
    first = process.stdout.readline()
    time.sleep(rng.uniform(0, LONGEST_S))
    assert process.poll() is None, "it ended by itself"
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read()
    # A line that the kill has cut short was not said.
    lines = [line for line in (first + rest).splitlines(keepends=True) if line.endswith("\n")]
    return [name for line in lines for name in line.split()]


def assert_holds(store: Path, acknowledged: list[str]) -> None:
    state = observe(store)
    assert set(acknowledged) <= set(state.rows)
    assert verify(store) == []


@pytest.mark.parametrize("writers", [1, 2])
@pytest.mark.parametrize("compacting", [False, True], ids=["", "compacted"])
def test_killed_writers_lose_nothing(tmp_path: Path, writers: int, compacting: bool) -> None:
    rng, store, said = random.Random(writers), tmp_path / "a.store", list[str]()
    for kill in range(KILLS // 4):
        names = [f"{kill}.{w}" for w in range(writers)]
        if compacting and kill:
            with worker(store, "compact"):
                said += killed(store, names, rng)
        else:
            said += killed(store, names, rng)
        assert_holds(store, said)
    assert len(said) >= KILLS // 4
    print(f"\n{KILLS // 4 * writers} writers killed, {len(said)} rows acknowledged, lost: 0")


def killed(store: Path, names: list[str], rng: random.Random) -> list[str]:
    """Let writers work at once, one for each name, and kill them one after the other."""
    if len(names) == 1:
        with worker(store, "write", names[0]) as process:
            return kill_at_random(process, rng)
    with worker(store, "write", names[0]) as one, worker(store, "write", names[1]) as other:
        assert one.stdout
        select.select([one.stdout], [], [], 30)
        return kill_at_random(other, rng) + kill_at_random(one, rng)


@pytest.mark.skipif(not FULL, reason="part of `make test-crash`: it starts torch a hundred times")
def test_killed_embeddings_lose_nothing(run: Path, tmp_path: Path) -> None:
    scenes, store = tmp_path / "many.tar", tmp_path / "s.store"
    write_scenes(scenes, 3_000, seed=4, tick=lambda: None)
    code = (
        "import mmalign.embed as e, sys; e.COMMIT_SECONDS = 0.0\n"
        "print('begins', flush=True)\n"
        "e.embed(sys.argv[1], [sys.argv[2]], sys.argv[3], precision='float32')"
    )
    rng, rows, kills = random.Random(5), 0, 0
    for _ in range(KILLS):
        command = [sys.executable, "-c", code, str(run), str(scenes), str(store)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout
            process.stdout.readline()
            time.sleep(rng.uniform(0, 1.0))
            kills += process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait()
        if store.exists() and list(store.glob("manifest-*.json")):
            ids = open_store(store).column("id")
            assert len(ids) == len(set(ids)) >= rows
            assert verify(store) == []
            rows = len(ids)
    embed(run, [str(scenes)], store, precision="float32")
    embed(run, [str(scenes)], tmp_path / "unbroken.store", precision="float32")
    whole, unbroken = open_store(store), open_store(tmp_path / "unbroken.store")
    assert sorted(whole.column("id")) == sorted(unbroken.column("id"))
    print(f"\n{kills} embeddings killed, {rows} rows by then, lost: 0")


@pytest.mark.skipif(not FULL, reason="part of `make test-crash`")
def test_a_flipped_bit_in_every_file_is_named(store: Path, tmp_path: Path) -> None:
    import shutil

    rng, flips = random.Random(6), 0
    files = sorted(p.relative_to(store) for p in store.rglob("*") if p.is_file())
    for file in files:
        for _ in range(20):
            copy = tmp_path / "copy.store"
            shutil.copytree(store, copy)
            content = bytearray((copy / file).read_bytes())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            (copy / file).write_bytes(content)
            assert any(str(copy / file) in line for line in verify(copy))
            open_store(copy)
            repair(copy)
            assert verify(copy) == []
            shutil.rmtree(copy)
            flips += 1
    print(f"\n{flips} bits flipped in {len(files)} files, unnamed: 0")
