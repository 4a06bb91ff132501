"""Small groups, so that the small stores of these tests have several."""

import pytest

from mmalign.store import groups


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "BORDER", 3)
