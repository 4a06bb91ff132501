"""Results never lie among the images that they are made of."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import QUICK, jpeg, write_tar
from stub_encoder import use_stub

from mmalign.embedding.embed import embed
from mmalign.errors import UsageError
from mmalign.training.train import train


def make_store(sources: list[str], out: Path) -> None:
    embed("stub", sources, out)


def make_run(sources: list[str], out: Path) -> None:
    train(sources, out, QUICK)


@pytest.mark.parametrize("make", [make_store, make_run])
@pytest.mark.parametrize(
    ("out", "source", "said"),
    [
        ("photos", "photos", "is a source"),
        ("photos/2020/s.store", "photos", "is inside the source .*photos"),
        (".", "photos", "contains the source .*photos"),
        ("link/new", "photos", "is inside the source"),
        ("photos", "link/2020", "contains the source"),
        ("shards", "shards/{0,1}.tar", "contains the source .*0.tar"),
        ("photos/new", "file:photos", "is inside the source"),
    ],
)
def test_results_in_a_source_or_around_it_are_refused_before_anything_is_written(
    make: Callable[[list[str], Path], None], out: str, source: str, said: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    use_stub(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "2020").mkdir(parents=True)
    (tmp_path / "photos" / "2020" / "a.jpg").write_bytes(jpeg())
    (tmp_path / "link").symlink_to("photos")
    (tmp_path / "shards").mkdir()
    for name in "01":
        write_tar(tmp_path / "shards" / f"{name}.tar", [("a.jpg", jpeg())])
    before = sorted(tmp_path.rglob("*"))
    given = source.replace("file:", f"file://{tmp_path}/")
    with pytest.raises(UsageError, match=rf"^--out {out}: {said}.*; use another --out$"):
        make([given], Path(out))
    assert sorted(tmp_path.rglob("*")) == before


def test_results_may_lie_beside_their_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_stub(monkeypatch)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(jpeg())
    write_tar(tmp_path / "t.tar", [("b.jpg", jpeg(1))])
    # The name of one begins with that of the other.
    sources = [str(tmp_path / "photos"), str(tmp_path / "t.tar")]
    assert embed("stub", sources, tmp_path / "photos.store").added == 2
