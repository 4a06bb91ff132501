"""The benchmark of the index: medians over turns, and speeds at the same recall."""

import pytest

from bench.index import _median, at_recall


def test_speed_at_a_recall_lies_between_its_two_nearest_points() -> None:
    curve = [(0.98, 100.0), (0.9, 400.0), (0.99, 50.0)]
    assert at_recall(curve, 0.94) == pytest.approx(200)
    assert at_recall(curve, 0.9) == pytest.approx(400)
    assert at_recall(curve, 0.995) is None
    assert at_recall([], 0.9) is None


def test_turns_become_one_row_with_medians_and_their_range() -> None:
    turns = [
        {"method": "x", "qps": qps, "p50_ms": 1000 / qps, "p99_ms": 2000 / qps}
        for qps in (100.0, 400.0, 200.0)
    ]
    row = _median(turns)
    assert (row["qps"], row["p50_ms"], row["qps_range"], row["turns"]) == (200, 5, "100-400", 3)
