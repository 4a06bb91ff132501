"""The comparison of exact searches, over vectors so few that it ends at once."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import measure, topk

OURS = {"mmalign Exact, without codes", "mmalign Exact", "mmalign topk, with codes"}


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Rows that would be written."""
    written: list[dict[str, Any]] = []
    monkeypatch.setattr(measure, "append", lambda _, row: written.append(row))
    monkeypatch.setattr(measure, "product_limit", lambda *_: 1e12)
    monkeypatch.setattr(measure, "read_limit", lambda *_: 1e10)
    monkeypatch.setattr(measure, "peak_bytes", lambda _: 0)
    return written


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU compares other searches")
def test_every_way_is_compared_over_every_cloud(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    vectors = topk.cloud(160, 32, 0, "cpu").numpy()
    np.save(tmp_path / "own.npy", vectors)
    words = "--rows 200 --dim 32 --queries 2 --rounds 1 --threads 1 --vectors"
    topk.main([*words.split(), str(tmp_path / "own.npy")])
    ways = {*OURS, topk.FAISS, topk.TORCH}
    assert {(r["vectors"], r["search"]) for r in rows} == {
        (cloud, way) for cloud in ("gap", "common", "own") for way in ways
    }
    for row in rows:
        assert bool(row["screen"]) == (row["search"] in OURS)
        assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        if row["search"] in OURS:
            assert row["wrong_ids"] == "0 of 20"
        if row["search"] == topk.FAISS:
            assert row["times_faiss"] == 1
    assert {r["rows"] for r in rows if r["vectors"] == "own"} == {160 - topk.CHECKED}


def test_vectors_of_the_second_cloud_are_nearly_alike() -> None:
    vectors = topk.common_cloud(100, 64, 0, "cpu").double()
    queries = topk.common_cloud(10, 64, 1, "cpu").double()
    for cosines in (vectors @ vectors.T, queries @ vectors.T):
        assert 0.85 < float(cosines.median()) < 0.97
    values = torch.linalg.svdvals(vectors - vectors.mean(dim=0))
    assert values[:32].square().sum() > 0.99 * values.square().sum()


@pytest.mark.slow
def test_vectors_of_a_store_are_asked_by_its_captions(store: Path) -> None:
    name, vectors, queries = topk.real([store], 4)
    assert name == store.stem
    assert vectors.dtype == torch.float16
    assert queries.shape == (4, vectors.shape[1])


def test_rows_of_another_day_keep_their_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column that is new is empty in older rows; one that is no more is in newer ones."""
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    monkeypatch.setattr(measure, "machine", lambda: {"kind": "model 17"})
    (tmp_path / "bench").mkdir()
    measure.append("some", {"ms": 1.5, "old": 2})
    measure.append("some", {"ms": 2.5, "new": 3})
    with open(tmp_path / "bench" / "results" / "some.csv", newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [
            {"ms": "1.5", "new": "", "kind": "model 17", "old": "2"},
            {"ms": "2.5", "new": "3", "kind": "model 17", "old": ""},
        ]


def test_a_kind_of_processor_is_told_by_what_it_multiplies() -> None:
    said = {"cpu family": "6", "model": "143", "flags": "fpu avx2 avx512f avx512_vnni amx_tile"}
    assert measure.kind(said) == "family 6 model 143 avx2 avx512f avx512_vnni amx"
    assert measure.kind({}) == ""
