"""Screens of exact search are chosen by what was measured once; answers do not depend on it."""

import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign import kernels, measured
from mmalign.kernels import exact, processor, timings
from mmalign.kernels.timings import QUERY_COUNTS, Timings

SCREENS = ["single", "half", "bfloat16", "int8"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every corpus is worth measuring, and every screen can be had; small samples."""
    monkeypatch.setenv("MMALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measured, "_known", {})
    monkeypatch.setattr(timings, "_busy_keys", set())
    monkeypatch.setattr(timings, "_is_quiet", lambda: True)
    monkeypatch.setattr(timings, "ROWS", 64)
    monkeypatch.setattr(timings, "MORE_ROWS", 128)
    monkeypatch.setattr(exact, "MEASURED_NUMBERS", 1)
    monkeypatch.setattr(exact, "has_bfloat16", lambda: True)
    return tmp_path / "cache"


class Clock:
    """Stands in for the searches of a measurement: `fastest` takes a tenth of the others' time."""

    def __init__(self, fastest: str) -> None:
        self.fastest, self.times = fastest, 0

    def __call__(self, ways: list[tuple[str, int]], *_: object, **__: object) -> dict[str, float]:
        self.times += 1
        return {f"{s} {c}": c if s == self.fastest else 10.0 * c for s, c in ways}


def unit(rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 32, generator=generator), dim=1)


@pytest.mark.parametrize("fastest", SCREENS)
@pytest.mark.parametrize("queries", [1, 16, 100])
def test_the_fastest_screen_is_taken_and_gives_equal_digits(
    fastest: str, queries: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fastest == "int8" and not processor.has_int8():
        pytest.skip("this torch multiplies no bytes")
    monkeypatch.setattr(timings, "_in_turns", Clock(fastest))
    monkeypatch.setattr(exact, "FEW_ROWS", 0)
    vectors, asked = unit(300).half(), unit(queries, seed=1)
    corpus = kernels.prepare(vectors, with_codes=processor.has_int8())
    chosen = kernels.choose_topk(asked, corpus)
    assert (chosen == fastest) == (queries >= timings.MIN_QUERIES.get(fastest, 1))
    wanted = kernels.topk(asked, vectors, 7, impl="reference")
    for found, right in zip(kernels.topk(asked, corpus, 7), wanted, strict=True):
        assert torch.equal(found, right)


def test_screens_are_measured_once_and_by_later_processes_not_at_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock("single")
    monkeypatch.setattr(timings, "_in_turns", clock)
    first = kernels.prepare(unit(300).half()).timings
    assert kernels.prepare(unit(200).half()).timings == first
    monkeypatch.setattr(measured, "_known", {})  # as a new process
    assert kernels.prepare(unit(200).half()).timings == first
    assert clock.times == 1
    (file,) = folder.iterdir()
    assert file.name.startswith("exact-search-")
    assert "single 256" in json.loads(file.read_text(encoding="utf-8"))["figures"]
    kernels.prepare(unit(200))  # float32 is measured apart
    assert clock.times == 2


def test_a_measurement_runs_every_screen_that_may_win(folder: Path) -> None:
    searched: list[tuple[str, int]] = []
    real: Callable[..., object] = exact.topk

    def note(queries_MD: Tensor, *rest: object, impl: str) -> object:
        searched.append((impl, len(queries_MD)))
        return real(queries_MD, *rest, impl=impl)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "topk", note)
        patch.setattr(timings, "REPEATED", 1e9)
        figures = kernels.prepare(unit(300).half()).timings
    assert figures is not None
    assert set(searched) == {(n.split()[0], int(n.split()[1])) for n in figures.ms}
    assert {f"single {count}" for count in QUERY_COUNTS} <= figures.ms.keys()
    assert "half 256" not in figures.ms
    assert "bfloat16 1" not in figures.ms


def test_nothing_is_measured_for_few_vectors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "MEASURED_NUMBERS", 300 * 32 + 1)
    monkeypatch.setattr(exact, "measure_screens", lambda *_: pytest.fail("it was measured"))
    assert kernels.prepare(unit(300).half()).timings is None
    assert not folder.exists()


@pytest.mark.parametrize("noticed", ["before", "meanwhile"])
def test_a_busy_moment_is_not_recorded(
    noticed: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures that do not come back are not taken; one process does not try again."""
    monkeypatch.setattr(timings, "_is_quiet", lambda: noticed == "meanwhile")
    ticks = itertools.accumulate(1.1**i / 1e3 for i in itertools.count())
    monkeypatch.setattr(timings.time, "perf_counter", lambda: next(ticks))
    vectors = unit(300).half()
    corpus = kernels.prepare(vectors)
    assert corpus.timings == Timings({})
    assert not folder.exists()
    assert kernels.choose_topk(unit(100), corpus) == kernels.choose_topk(
        unit(100), exact.replace(corpus, timings=None)
    )
    monkeypatch.setattr(timings, "measured", lambda *_: pytest.fail("it was measured again"))
    assert kernels.prepare(vectors).timings == Timings({})


@pytest.mark.parametrize(("growth", "quiet"), [(0.0, True), (0.1, False)])
def test_equal_times_of_one_product_say_that_nothing_else_runs(
    growth: float, quiet: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.accumulate((1 + growth) ** i for i in itertools.count())
    monkeypatch.setattr(timings.time, "perf_counter", lambda: next(ticks))
    assert timings._is_quiet() == quiet


def test_a_measurement_that_takes_too_long_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = []
    clock = itertools.count()
    monkeypatch.setattr(timings.time, "perf_counter", lambda: float(next(clock)))
    with pytest.raises(timings._BusyError):
        timings._in_turns([("single", 1)], lambda *way: searched.append(way), until=3.0)
    assert 0 < len(searched) < 4


def test_threads_that_prepare_at_once_measure_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock("half")
    monkeypatch.setattr(timings, "_in_turns", clock)
    found: list[Timings | None] = []
    threads = [
        threading.Thread(target=lambda: found.append(kernels.prepare(unit(300).half()).timings))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock.times == 1
    assert len(found) == 4
    assert all(f == found[0] for f in found)


def test_a_folder_that_cannot_be_written_is_no_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.touch()
    clock = Clock("half")
    monkeypatch.setattr(timings, "_in_turns", clock)
    for _ in range(2):
        assert kernels.prepare(unit(300).half()).timings is not None
    assert clock.times == 1


def test_the_usual_screen_is_left_only_for_one_that_is_clearly_faster() -> None:
    known = Timings({"single 1": 10.0, "half 1": 9.5, "single 4": 10.0, "half 4": 5.0})
    assert known.fastest("single", ["single", "half"], 1) == "single"
    assert known.fastest("single", ["single", "half"], 4) == "half"
    assert known.fastest("half", ["single", "half"], 4) == "half"
    assert known.fastest("bfloat16", ["single"], 4) == "single"
    assert Timings({}).fastest("bfloat16", ["single", "bfloat16"], 4) == "bfloat16"


def test_times_between_numbers_of_queries_are_interpolated() -> None:
    known = Timings({"half 4": 4.0, "half 16": 16.0})
    assert known.expected("half", 10) == 10.0
    assert known.expected("half", 64) == 64.0
    assert known.expected("half", 4) == 4.0
    assert known.expected("half", 1) == float("inf")
    assert known.expected("single", 4) == float("inf")
