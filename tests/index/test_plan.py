"""The planner: rounds on samples, fair timings, and what it says of what cannot be had."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from clouds import DIM, texts, vectors

from mmalign.index import Queries, VectorReader, approximate
from mmalign.index import plan as planner
from mmalign.index.measure import QUERIES_PER_TURN, Trial, time_in_turns
from mmalign.index.plan import SPECS, plan
from mmalign.index.spec import IndexSpec, OperatingPoint
from mmalign.search import build


class Index:
    """Remembers who was asked."""

    def __init__(self, name: str, asked: list[tuple[str, int]]) -> None:
        self.name, self.asked = name, asked

    def search_at(self, queries_MD: np.ndarray, point: OperatingPoint) -> None:
        """Answer nothing."""
        assert len(queries_MD) == 1
        self.asked.append((self.name, point.k))


def test_contestants_take_turns() -> None:
    asked: list[tuple[str, int]] = []
    one, other = Index("one", asked), Index("other", asked)
    queries = np.zeros((QUERIES_PER_TURN + 20, 4), np.float32)
    seconds = time_in_turns(
        [(one, OperatingPoint(1, 1, 1)), (other, OperatingPoint(2, 1, 1))], queries
    )  # type: ignore[list-item]
    assert [len(s) for s in seconds] == [QUERIES_PER_TURN + 20, QUERIES_PER_TURN + 20]
    # One search more at the start of each turn warms up.
    expected = [("one", 1)] * (QUERIES_PER_TURN + 1) + [("other", 2)] * (QUERIES_PER_TURN + 1)
    assert asked == expected + [("one", 1)] * 21 + [("other", 2)] * 21


@pytest.mark.slow
def test_those_near_the_best_go_on_with_its_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timings are made up: the third design is the best, the second needs less than half more."""
    monkeypatch.setattr(planner, "EXACT_ROWS", 500)
    monkeypatch.setattr(planner, "ROUND_ROWS", (500, 1_000))
    milliseconds = {SPECS[0]: 9.0, SPECS[1]: 1.4, SPECS[2]: 1.0, SPECS[3]: 1.6}
    rounds: list[list[IndexSpec]] = []

    class Timed(planner._Tournament):
        def results(self) -> Any:
            rounds.append([entry[0] for entry in self.entries])
            monkeypatch.setattr(
                planner,
                "time_in_turns",
                lambda found, queries: [
                    np.full(3, milliseconds.get(design, 5.0) / 1000) for design in rounds[-1]
                ],
            )
            return super().results()

    monkeypatch.setattr(planner, "_Tournament", Timed)
    asked = {"text": Queries(texts(200), texts(100, seed=2))}
    made = plan(VectorReader([vectors(2_000)]), asked, 0.5, memory=1e7)
    best = SPECS[2]
    assert rounds[0] == list(SPECS)
    assert rounds[1][:2] == [best, SPECS[1]]
    assert [(d.lists_factor, d.metric) for d in rounds[1][2:]] == [
        (2, "vectors"),
        (4, "vectors"),
        (1, "queries"),
    ]
    assert made.spec == best
    assert len(made.tried) == len(rounds[0]) + len(rounds[1])


def _result(spec: IndexSpec, text_ms: float, image_ms: float) -> planner._Result:
    def trial(modality: str, milliseconds: float) -> Trial:
        return Trial(
            spec.name(1_000, 32), 1_000, modality, OperatingPoint(10, 4, 20), 100, 0.95, 0.94, 0.96,
            milliseconds, milliseconds, 1_000 / milliseconds, 20.0, 1.0,
        )  # fmt: skip

    return planner._Result(spec, [trial("text", text_ms), trial("image", image_ms)], reached=True)


def test_of_specs_equally_fast_for_texts_the_one_fastest_for_images_is_best() -> None:
    first, second, third = SPECS[:3]
    results = [_result(first, 1.0, 3.0), _result(second, 1.1, 1.0), _result(third, 1.3, 0.2)]
    assert [result.spec for result in planner.best_first(results)] == [second, first, third]
    assert planner.best_first([]) == []


def test_the_fastest_for_images_goes_on_though_texts_are_slow_with_it() -> None:
    results = planner.best_first([_result(SPECS[0], 1.0, 3.0), _result(SPECS[1], 9.0, 1.0)])
    assert planner._advancing(results, entered=2) == [SPECS[0], SPECS[1]]
    results = planner.best_first([_result(SPECS[0], 1.0, 1.0), _result(SPECS[1], 9.0, 3.0)])
    assert planner._advancing(results, entered=2) == [SPECS[0]]


def test_what_one_index_costs_image_queries_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    results = planner.best_first([_result(SPECS[0], 1.0, 3.0), _result(SPECS[1], 2.0, 1.0)])
    planner._say_what_others_would_gain(results)
    said = " ".join(capsys.readouterr().err.split())
    assert f"image queries are 3.0 times faster with {SPECS[1].name(1_000, 32)}" in said
    assert "text queries 2.0 times slower; --prefer image" in said
    planner._say_what_others_would_gain([_result(SPECS[0], 1.0, 1.2), _result(SPECS[1], 2.0, 1.0)])
    planner._say_what_others_would_gain([])
    assert not capsys.readouterr().err


@pytest.mark.slow
def test_lists_learn_from_all_queries_and_fewer_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "EXACT_ROWS", 500)
    monkeypatch.setattr(planner, "ROUND_ROWS", (500,))
    monkeypatch.setattr(planner, "TUNING_QUERIES", 40)
    clustered, tuned = planner.cluster, planner.tune
    learned, counts = [], []

    def cluster(rows: VectorReader, design: IndexSpec, queries_MD: np.ndarray) -> Any:
        learned.append(len(queries_MD))
        return clustered(rows, design, queries_MD)

    def tune(index: Any, queries_MD: np.ndarray, *rest: Any) -> Any:
        counts.append(len(queries_MD))
        return tuned(index, queries_MD, *rest)

    monkeypatch.setattr(planner, "cluster", cluster)
    monkeypatch.setattr(planner, "tune", tune)
    stored = vectors(2_000)
    asked = {
        "text": Queries(texts(200), texts(100, seed=2)),
        "image": Queries(stored[:80].astype(np.float32), stored[80:160].astype(np.float32), True),
    }
    made = plan(VectorReader([stored]), asked, 0.5, memory=4e5)
    assert made.spec.kind == "ivf"
    assert set(learned) == {200}
    assert counts[-4:] == [40, 40, 40, 40]
    assert [t.queries for t in made.measured] == [100, 100, 80, 80]


def test_little_memory_is_said_before_anything_is_built(capsys: pytest.CaptureFixture[str]) -> None:
    asked = {"text": Queries(texts(100), texts(100))}
    made = plan(VectorReader([vectors(60_000)]), asked, 0.9, memory=100_000)
    assert made.spec.kind == "exact"
    said = capsys.readouterr().err
    assert "no index of 60,000 vectors fits in 0.1 MB, so search will be exact" in said


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_the_memory_that_is_called_enough_is_enough(
    share: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what the user writes, of which an index of one modality gets a share."""
    asked = {"text": Queries(texts(100), texts(100))}
    plan(VectorReader([vectors(60_000)]), asked, 0.9, memory=1e3 * share, memory_share=share)
    said = capsys.readouterr().err
    enough = float(said.split("--memory ")[-1].split("MB is enough")[0]) * 1e6
    tried: list[list[IndexSpec]] = []

    def rounds(
        designs: list[IndexSpec], *_: object, **__: object
    ) -> tuple[list[IndexSpec], list[Trial]]:
        tried.append(designs)
        raise KeyboardInterrupt

    monkeypatch.setattr("mmalign.index.plan._run_rounds", rounds)
    with pytest.raises(KeyboardInterrupt):
        plan(VectorReader([vectors(60_000)]), asked, 0.9, memory=enough * share, memory_share=share)
    assert tried[0]


@pytest.mark.parametrize("dim", [1, 6, 30, 33])
def test_vectors_of_any_width_get_an_index(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of four dims at once need a width that four divides; others take their place."""
    monkeypatch.setattr("mmalign.index.plan.EXACT_ROWS", 10)
    monkeypatch.setattr("mmalign.index.plan.ROUND_ROWS", (300,))
    stored = np.random.default_rng(0).standard_normal((400, dim)).astype(np.float32)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    asked = {"text": Queries(stored[:20], stored[20:40])}
    made = plan(VectorReader([stored.astype(np.float16)]), asked, 0.1, memory=1e7)
    assert {t.spec_name for t in made.tried}
    assert made.spec.fits_dim(dim)


@pytest.mark.parametrize("count", [1, 3])
def test_a_few_queries_are_enough_to_choose(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmalign.index.plan.EXACT_ROWS", 500)
    asked = {"text": Queries(texts(count + 1)[:count], texts(1, seed=2))}
    made = plan(VectorReader([vectors(2_000)]), asked, 0.5, memory=1e6)
    assert made.tried
    assert made.index is not None
    assert {t.queries for t in made.measured} == {1}


def test_a_design_that_falls_short_over_all_rows_is_followed_by_the_next(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built_for_real, given = planner._build_and_tune, []

    def fall_short_twice(design: IndexSpec, *rest: Any) -> Any:
        given.append(design)
        return None if len(given) < 3 else built_for_real(design, *rest)

    monkeypatch.setattr(planner, "EXACT_ROWS", 500)
    monkeypatch.setattr(planner, "_build_and_tune", fall_short_twice)
    asked = {"text": Queries(texts(40), texts(20, seed=2))}
    made = plan(VectorReader([vectors(2_000)]), asked, 0.5, memory=1e7)
    assert made.index is not None
    assert made.spec == given[2]
    assert len(set(given)) == 3
    assert capsys.readouterr().err.count("does not reach a recall of 50.0% over all rows") == 2


def hard(count: int) -> Any:
    """Queries that lie anywhere, and so harder to answer than those that lie near rows."""
    drawn = np.random.default_rng(5).normal(size=(count, DIM)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


@pytest.mark.slow
@pytest.mark.parametrize("stored", [False, True])
def test_what_held_out_queries_miss_is_looked_for_wider(
    stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the queries that tune are easy, those that measure are answered as promised."""
    monkeypatch.setattr(planner, "EXACT_ROWS", 500)
    monkeypatch.setattr(planner, "ROUND_ROWS", (500,))
    monkeypatch.setattr(planner, "SPECS", SPECS[:1])
    starts: list[OperatingPoint] = []
    tuned = planner.tune

    def tune(*given: Any) -> Any:
        found = tuned(*given)
        if len(given[0].vectors.shards[0]) == 1_000:
            starts.append(found[0])
        return found

    monkeypatch.setattr(planner, "tune", tune)
    rows = vectors(1_000)
    asked = {"text": Queries(texts(100), hard(120))}
    if stored:
        asked["image"] = Queries(texts(100), rows[:200].astype(np.float32), True)
    made = plan(VectorReader([rows]), asked, 0.9, memory=1e7)
    assert made.spec.kind == "ivf"
    assert len(made.measured) == (4 if stored else 2)
    assert all(trial.low >= 0.9 for trial in made.measured)
    # What is fastest at the start is found by a clock: nprobe, or the candidates, may be the
    # one that has room to grow.
    wider = [
        made.nprobe_or_ef > start.nprobe_or_ef or made.candidates > start.candidates
        for made, start in zip(made.points["text"], starts, strict=False)
    ]
    assert any(wider)


def test_a_promise_that_held_out_queries_miss_is_not_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With all lists searched, codes of 4 bits for four dimensions tell too little of them."""
    monkeypatch.setattr(planner, "EXACT_ROWS", 500)
    monkeypatch.setattr(planner, "ROUND_ROWS", (500,))
    monkeypatch.setattr(planner, "SPECS", SPECS[1:2])
    monkeypatch.setattr("mmalign.index.measure.MAX_CANDIDATES_PER_K", 2)
    asked = {"text": Queries(vectors(200, 3).astype(np.float32), hard(300))}
    made = plan(VectorReader([vectors(4_000)]), asked, 0.5, memory=1e7)
    assert made.spec.kind == "exact"
    said = capsys.readouterr().err
    assert "over all rows: tuning queries or held-out queries fall short" in said
    assert "so search will be exact" in said


def test_captions_of_an_image_tune_or_measure() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(40, size=300)
    queries = build._split(rng.normal(size=(300, 4)).astype(np.float32), images)
    assert queries.held_out_image_ids_M is not None
    held = set(queries.held_out_image_ids_M.tolist())
    assert 100 < len(queries.held_out_MD) <= 150
    assert len(queries.tune_MD) + len(queries.held_out_MD) == 300
    assert (
        len(queries.held_out_image_ids_M)
        == len(queries.held_out_MD)
        == np.isin(images, list(held)).sum()
    )
    for count in (0, 1, 2):
        few = build._split(np.eye(4, dtype=np.float32)[:count], np.arange(count))
        assert (len(few.tune_MD), len(few.held_out_MD)) == (count - count // 2, count // 2)
    same = build._split(np.ones((5, 4), np.float32), np.arange(5))
    assert (len(same.tune_MD), len(same.held_out_MD)) == (1, 0)


def test_too_few_queries_to_be_sure_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    trial = {"asked": "text", "queries": 12, "low": 0.88, "high": 1.0, "point": {"k": 10}}
    part = {"kind": "ivf", "tried": [], "measured": [trial], "recall_wanted": 0.9}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "table", lambda trials: "")
        build._report("image", part)
        build._report("image", part | {"measured": [trial | {"low": 0.91}]})
    said = [line for line in capsys.readouterr().err.splitlines() if "too few" in line]
    assert len(said) == 1
    assert (
        "12 held-out text queries are too few to confirm a recall of 90.0%: recall@10 lies"
        in said[0]
    )


def test_a_build_leaves_threads_and_random_numbers_of_the_process_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planner, "EXACT_ROWS", 10)
    monkeypatch.setattr(planner, "ROUND_ROWS", (300,))

    def state() -> tuple[Any, ...]:
        drawn = (np.random.get_state(), random.getstate(), torch.get_rng_state())  # noqa: NPY002
        threads = (torch.get_num_threads(), approximate.faiss.omp_get_max_threads())
        return *threads, *map(str, drawn)

    before = state()
    asked = {"text": Queries(texts(20), texts(20))}
    assert plan(VectorReader([vectors(400)]), asked, 0.1, memory=1e7).index is not None
    assert state() == before
