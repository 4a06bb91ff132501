"""Small groups, and deletions in files of their own, as large stores have them."""

import pytest

from mmalign.store import groups, shards


@pytest.fixture(autouse=True)
def _as_if_large(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(groups, "BORDER", 3)
    # Of one or two bytes of bits the deletions are inside of a group, but not when writers die.
    monkeypatch.setattr(shards, "MOST_INLINE", 0 if "crash" in request.path.name else 12)
