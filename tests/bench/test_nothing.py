"""The benchmark of rejected queries, on a store of which it is known what it lacks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from topic_store import KNOWN, Drawn, write

from bench import nothing
from mmalign.search.build import build_index


def test_every_way_is_measured_in_both_languages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = []
    monkeypatch.setattr(nothing.measure, "append", lambda name, row: rows.append(row))
    monkeypatch.setattr(nothing, "RESAMPLES", 20)
    for module in ("bench.nothing", "mmalign.search.build"):
        monkeypatch.setattr(f"{module}.model_of", lambda *_: Drawn())
    store = write(tmp_path / "present.store")
    build_index(store)
    absent = write(tmp_path / "absent.store", first=KNOWN)
    nothing.main([str(store), str(absent)])
    assert {(row["language"], row["way"]) for row in rows} == {
        (language, way) for language in ("other", "zh") for way in ("relevance", "cosine", "jump")
    }
    for row in rows:
        if row["way"] == "relevance":
            assert float(row["present_rejected"].split()[0]) <= 0.1
            assert float(row["rejected absent"].split()[0]) >= 0.95
            assert float(row["rejected absent phrases"].split()[0]) >= 0.95


def test_a_lead_over_itself_is_none() -> None:
    values = np.random.default_rng(0).normal(size=(2, 50))
    assert nothing.lead([(values[0], values[1])] * 2) == "0.000 to 0.000"
