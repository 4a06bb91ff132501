"""Scoring candidates: the answers of exact top-k over all of them, ties and gaps included."""

import pytest
import torch
import torch.nn.functional as F

from mmalign import kernels
from mmalign.errors import VectorError
from mmalign.kernels import candidates


@pytest.mark.parametrize("count", [1, 7, 40])
@pytest.mark.parametrize("k", [1, 5, 30, 50])
def test_the_best_candidates_are_those_of_top_k(
    count: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "AT_ONCE", 4_096)
    torch.manual_seed(0)
    stored = F.normalize(torch.randn(200, 48), dim=1).half()
    stored[50:60] = stored[40:50]  # equal scores
    queries = F.normalize(torch.randn(count, 48), dim=1)
    rows = torch.stack([torch.randperm(200)[:30] for _ in range(count)])
    rows[:, 10:15] = -1
    scores, found = kernels.best_candidates(queries, stored[rows], rows, k)
    for m in range(count):
        allow = torch.zeros(200, dtype=torch.bool)
        allow[rows[m][rows[m] >= 0]] = True
        expected = kernels.topk(queries[m : m + 1], stored, k, allow=allow, impl="reference")
        assert torch.equal(scores[m], expected[0][0])
        assert torch.equal(found[m], expected[1][0])


def test_no_queries_and_no_candidates() -> None:
    scores, rows = kernels.best_candidates(
        torch.zeros(0, 8), torch.zeros(0, 4, 8), torch.zeros(0, 4, dtype=torch.int64), 3
    )
    assert scores.shape == rows.shape == (0, 3)
    scores, rows = kernels.best_candidates(
        torch.ones(2, 8), torch.zeros(2, 0, 8), torch.zeros(2, 0, dtype=torch.int64), 3
    )
    assert (rows == -1).all()
    assert (scores == -torch.inf).all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(VectorError, match="do not match"):
        kernels.best_candidates(
            torch.ones(2, 8), torch.ones(2, 4, 9), torch.zeros(2, 4, dtype=torch.int64), 3
        )
