"""Each sample is counted once, and ends in one way; who loses all of them is told so."""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from conftest import jpeg, write_tar
from stub_encoder import LONGEST, use_stub

from mmalign.cli.main import main
from mmalign.encoding.batches import TextCache
from mmalign.store import open_store


@pytest.fixture(autouse=True)
def _stub(monkeypatch: pytest.MonkeyPatch) -> None:
    use_stub(monkeypatch)


def embed(store: Path, *sources: object) -> Result:
    words = ["embed", "--model", "stub", "--out", str(store), "--json"]
    return CliRunner().invoke(main, [*words, *(f"--data={source}" for source in sources)])


@dataclass
class Truth:
    """Samples of every kind, and what is to become of each."""

    draw: random.Random
    files: dict[str, bytes] = field(default_factory=dict)
    good: int = 0
    bad: int = 0
    others: int = 0
    cut: int = 0

    def add(self, number: int) -> None:
        """Add a sample that is as it should be, or is not."""
        name = f"{number:03d}"
        kind = self.draw.choice(["good", "good", "long", "broken", "empty", "orphan", "other"])
        if kind == "other":
            self.files[f"{name}.{self.draw.choice(['mp4', 'doc', 'srt'])}"] = b"something"
            self.others += 1
        elif kind == "orphan":
            self.files[f"{name}.txt"] = b"words without an image"
            self.bad += 1
        elif kind in ("broken", "empty"):
            self.files[f"{name}.jpg"] = jpeg(number)[:300] if kind == "broken" else b""
            self.bad += 1
        else:
            words = f"picture {number}" + (" and more of it" * LONGEST if kind == "long" else "")
            self.files |= {f"{name}.jpg": jpeg(number), f"{name}.txt": words.encode()}
            self.cut += kind == "long"
            self.good += 1

    def write(self, place: Path) -> Path:
        """Write them as a tar, a table or a folder."""
        if place.suffix == ".tar":
            return write_tar(place, list(self.files.items()))
        if place.suffix == ".parquet":
            images = [n for n in self.files if n.endswith(".jpg")]
            captions = [self.files.get(f"{n[:3]}.txt", b"").decode() for n in images]
            columns = {"image": [self.files[n] for n in images], "caption": captions}
            pq.write_table(pa.table(columns), place)
            self.bad, self.others = sum(f"{n[:3]}.txt" not in self.files for n in images), 0
            return place
        place.mkdir()
        for name, content in self.files.items():
            (place / name).write_bytes(content)
        return place


@pytest.mark.parametrize("seed", range(6))
def test_every_sample_ends_in_one_way(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    truths, sources = [], []
    for name in ("f", "t.tar", "u.parquet"):
        truths.append(Truth(draw))
        for number in range(12):
            truths[-1].add(100 * len(truths) + number)
        sources.append(truths[-1].write(tmp_path / name))
    good, bad = sum(t.good for t in truths), sum(t.bad for t in truths)
    others, cut = sum(t.others for t in truths), sum(t.cut for t in truths)
    # What is given twice is counted once.
    ran = embed(tmp_path / "s.store", *sources, sources[draw.randrange(3)])
    first = json.loads(ran.stdout)
    names = ("added", "changed", "present", "failed", "passed_over", "cut_captions", "moved")
    assert [first[n] for n in names] == [good, 0, 0, bad, others, cut, 0]
    assert f"{good} added, 0 already there, {bad} failed" in ran.stderr
    assert (f"{cut} captions are longer than" in ran.stderr) == (cut > 0)
    assert len(open_store(tmp_path / "s.store").failures()) >= bad
    # Nothing new: the same samples, ending otherwise; what failed is tried again.
    again = json.loads(embed(tmp_path / "s.store", *sources).stdout)
    assert [again[n] for n in names] == [0, 0, good, bad, others, 0, 0]
    assert again["rows"] == good


def cut_short(folder: Path) -> Path:
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(jpeg(i)[:400])
    return folder


def table_of_windows(folder: Path) -> Path:
    folder.mkdir()
    rows = [f"C:\\photos\\{i}.jpg,words" for i in range(3)]
    (folder / "windows.csv").write_text("\n".join(["image,caption", *rows]))
    return folder / "windows.csv"


@pytest.mark.parametrize("make", [cut_short, table_of_windows])
def test_a_total_loss_is_no_success(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    ran = embed(tmp_path / "s.store", make(tmp_path / "lost"))
    assert ran.exit_code == 1
    assert "mmalign: none of the 3 samples can be used: 3 " in ran.stderr
    assert len(open_store(tmp_path / "s.store").failures()) == 3
    # Beside one that can be used it is a warning.
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.jpg").write_bytes(jpeg())
    ran = embed(tmp_path / "s.store", tmp_path / "lost", tmp_path / "f")
    ran = embed(tmp_path / "s.store", *[*(tmp_path / "lost").glob("*.csv"), tmp_path / "f"][:2])
    assert (ran.exit_code, "warning: " in ran.stderr) == (0, make is table_of_windows)


def test_folders_and_tars_without_captions_say_what_there_is_beside_the_images(
    tmp_path: Path,
) -> None:
    described = [
        (name, content)
        for i in range(3)
        for name, content in (
            (f"{i}.jpg", jpeg(i)),
            (f"{i}.json", b'{"alt_text": "a word", "rating": 3}'),
            (f"{i}.srt", b"a word"),
        )
    ]
    folder = tmp_path / "f"
    folder.mkdir()
    for name, content in described:
        (folder / name).write_bytes(content)
    for source in (folder, write_tar(tmp_path / "t.tar", described)):
        ran = embed(tmp_path / f"{source.name}.store", source)
        assert (
            "no captions found: looked for under captions (see --caption-key); the metadata of the "
            "images has the fields alt_text, rating; other files: 3 .srt\n"
        ) in ran.stderr
        words = ["train", "--out", str(tmp_path / "run"), "--data", str(source)]
        ran = CliRunner().invoke(main, words)
        assert ran.exit_code == 1
        assert "3 no caption" in ran.stderr
        assert (
            "the metadata of the images has the fields alt_text, rating; other files" in ran.stderr
        )
    (folder / "0.txt").write_text("words")
    assert "no captions" not in embed(tmp_path / "f.store", folder).stderr


def test_a_caption_that_two_threads_meet_is_counted_once() -> None:
    from stub_encoder import StubEncoder

    class Waiting(StubEncoder):
        """Encodes a text while another thread encodes the same."""

        def encode_texts(self, texts):  # type: ignore[no-untyped-def]
            if not nested:
                nested.append(True)
                counting([["x" * (LONGEST + 1)]])
            return super().encode_texts(texts)

    nested: list[bool] = []
    counting = TextCache(Waiting())  # type: ignore[arg-type]
    counting([["x" * (LONGEST + 1), "short"]])
    assert counting.truncated == 1
