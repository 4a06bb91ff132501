"""Real processes, killed at random moments: what they said was done is done, and all is whole."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from crash_worker import steps
from ledger import Rows, observe

from mmalign import open_store
from mmalign.data.scenes import write_scenes
from mmalign.embedding.embed import embed
from mmalign.store import verify

FULL = os.environ.get("MMALIGN_CRASH") == "full"
KILLS = 100 if FULL else 4
SCENES = 1_000


@contextmanager
def worker(*words: object, quiet: bool = False) -> Iterator[subprocess.Popen[str]]:
    """Run a worker; it is dead when the block ends."""
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / "helpers" / "crash_worker.py"),
        *map(str, words),
    ]
    pipe, err = subprocess.PIPE, subprocess.DEVNULL if quiet else None
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=err, text=True) as process:
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def killed(process: subprocess.Popen[str], after_s: float) -> int:
    """Kill a writer some time after its first word; return how many steps it acknowledged."""
    assert process.stdout
    first = process.stdout.readline()
    time.sleep(after_s)
    assert process.poll() is None, "it ended by itself"
    process.kill()
    # A line that the kill has cut short was not said.
    return (first + process.stdout.read()).count("\n")


def outcomes(name: str, acknowledged: int) -> list[Rows]:
    """What a writer may leave: its acknowledged steps, and a whole part of the next one."""
    held: Rows = {}
    for number, (rows, gone) in enumerate(islice(steps(name), acknowledged + 1)):
        before = held
        held = {**before, **rows}
        after = {one: version for one, version in held.items() if one not in gone}
        if number == acknowledged:
            return [before, held, after]
        held = after
    return [held]


@pytest.mark.slow
@pytest.mark.parametrize("writers", [1, 2])
@pytest.mark.parametrize("compacting", [False, True], ids=["alone", "compacted"])
def test_killed_writers_lose_nothing(
    tmp_path: Path, writers: int, compacting: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, store, promised = random.Random(writers), tmp_path / "a.store", Rows()
    said = 0
    for kill in range(KILLS // 4):
        names = [f"{kill}.{w}" for w in range(writers)]
        with ExitStack() as running:
            if compacting and kill:
                running.enter_context(worker(store, "compact"))
            processes = [running.enter_context(worker(store, "write", name)) for name in names]
            counts = [killed(process, rng.uniform(0, 0.25)) for process in processes]
        state = observe(store)
        assert verify(store) == []
        for name, count in zip(names, counts, strict=True):
            left = {i: v for i, v in state.rows.items() if i.startswith(f"{name}-")}
            assert left in outcomes(name, count)
            promised |= left
        # Nothing else has changed, whoever was killed in the middle of what.
        assert state.rows == {**promised, "everybody's": state.rows["everybody's"]}
        said += sum(counts)
    tell(capsys, f"{KILLS // 4 * writers:7} writers killed after {said} acknowledged steps")


@pytest.mark.skipif(not FULL, reason="part of `make test-crash`")
@pytest.mark.parametrize("how", multiprocessing.get_all_start_methods()[:2])
def test_killed_embeddings_lose_nothing(
    run: Path, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = tmp_path / "many.tar"
    write_scenes(scenes, SCENES, seed=4, tick=lambda: None)
    embed(run, [str(scenes)], tmp_path / "unbroken.store", precision="float32")
    unbroken = vectors(tmp_path / "unbroken.store")
    assert len(unbroken) == SCENES
    rng, kills, ended, promised = random.Random(5), 0, 0, set[str]()
    with worker(tmp_path, "embed", run, scenes, how, quiet=True) as process:
        while kills < (KILLS if how == "fork" else KILLS // 10) or not ended:
            store = tmp_path / f"{ended}.store"
            status, said = embedding(process, store.name, rng.uniform(0, 1.5))
            assert status in (0, signal.SIGKILL)
            promised |= said
            held = vectors(store) if list(store.glob("manifest-*.json")) else {}
            assert promised <= set(held)
            assert all(np.allclose(v, unbroken[name], atol=2e-3) for name, v in held.items())
            if held:
                assert verify(store) == []
            if status == 0:
                assert set(held) == set(unbroken)
                ended, promised = ended + 1, set()
            kills += status == signal.SIGKILL
    tell(capsys, f"{kills:7} embeddings killed, while {ended} others ended")


def embedding(process: subprocess.Popen[str], store: str, after_s: float) -> tuple[int, set[str]]:
    """Let a process embed and kill it; return how it ended, and the ids it acknowledged."""
    assert process.stdin
    assert process.stdout
    print(store, file=process.stdin, flush=True)
    told, pid = process.stdout.readline().split()
    assert told == "pid"
    time.sleep(after_s)
    with suppress(ProcessLookupError):
        os.kill(int(pid), signal.SIGKILL)
    said: set[str] = set()
    for line in iter(process.stdout.readline, ""):
        first, *words = line.split()
        if first == "ended":
            return int(words[0]), said
        said |= set(words)
    raise AssertionError("the worker is gone")


def vectors(store: Path) -> dict[str, np.ndarray]:
    """Read the vector of each id, which must be there once."""
    opened = open_store(store)
    names = opened.column("id")
    assert len(names) == len(set(names))
    return dict(
        zip(names, np.concatenate([*opened.vectors("image"), np.zeros((0, 128))]), strict=True)
    )


def tell(capsys: pytest.CaptureFixture[str], line: str) -> None:
    if FULL:
        with capsys.disabled():
            print(f"\n{line}")
