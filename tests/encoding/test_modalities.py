"""A modality beside images and texts: registered, embedded, searched, and missing elsewhere."""

import os
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from command import answer, call
from conftest import jpeg
from PIL import ImageColor

import mmalign
from mmalign import modality as table
from mmalign.data import fit_image, image_of, scan
from mmalign.encoding import modalities
from mmalign.encoding.images import ImageEncoder
from mmalign.errors import DataError, IdentityError, UsageError
from mmalign.model import Encoder, new_model, save_model
from mmalign.store import Writer, compact, open_store


class Colours(mmalign.ModalityEncoder):
    """Each colour of a file, and what part of the file it is."""

    version = 1
    encoded = 0

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.side = encoder, encoder.preprocess.size
        self.identity = f"colours-{self.version}"

    def decode(self, content: bytes, *, thumbnail: bool = False) -> mmalign.Decoded:
        try:
            colours = [ImageColor.getrgb(word) for word in content.decode().split()]
        except ValueError as error:
            raise mmalign.SampleProblem(f"no colours: {error}") from None
        ends_V = np.arange(len(colours) + 1, dtype=np.float32) / len(colours)
        seconds_V2 = np.stack([ends_V[:-1], ends_V[1:]], axis=1)
        return mmalign.Decoded(colours, seconds_V2)

    def encode(self, parts: Sequence[tuple[int, ...]]) -> np.ndarray:
        Colours.encoded += len(parts)
        pixels = np.zeros((len(parts), self.side, self.side, 3), np.uint8)
        pixels += np.array(parts, np.uint8)[:, None, None]
        return self.encoder.encode_images(pixels)


COLOURS = mmalign.Modality("colours", position="seconds", suffixes=(".colours",))


@pytest.fixture(autouse=True)
def _only_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_known", dict(table._known))
    monkeypatch.setattr(table, "_by_suffix", dict(table._by_suffix))
    monkeypatch.setattr(modalities, "_makers", dict(modalities._makers))
    Colours.encoded = 0


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    torch.manual_seed(0)
    encoder = new_model("nano", ["a dog", "two cats"])
    run = tmp_path_factory.mktemp("run")
    save_model(encoder, run)
    return mmalign.load_model(run)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "things"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
        (folder / f"{number}.txt").write_text(f"picture {number}\nagain {number}")
    (folder / "warm.colours").write_text("#c83c3c\n#ffa000\n#ffe000\n")
    (folder / "warm.txt").write_text("sunset colours")
    (folder / "cold.colours").write_text("#2040c0")
    (folder / "bad.colours").write_text("bluish")
    return folder


def test_it_is_embedded_beside_the_others(encoder: Encoder, folder: Path) -> None:
    mmalign.register_modality(COLOURS, Colours)
    report = mmalign.embed(encoder, folder, folder.parent / "s.store", precision="float32")
    assert (report.added, report.failed, report.passed_over) == (5, 1, 0)
    store = open_store(folder.parent / "s.store")
    assert [f["reason"].split(":")[0] for f in store.failures()] == ["no colours"]
    assert store.modalities == ("image", "text", "colours")
    ids = store.column("id")
    warm = ids.index("things/warm.colours")
    ways = Colours(encoder)
    expected_VD = ways.encode(ways.decode(b"#c83c3c #ffa000 #ffe000").parts)
    assert np.allclose(store.vectors_of("colours", warm), expected_VD, atol=1e-3)
    assert np.allclose(
        store.positions_of("colours", warm), [[0, 1 / 3], [1 / 3, 2 / 3], [2 / 3, 1]]
    )
    assert len(store.vectors_of("image", warm)) == 0
    assert store.manifest.model.towers[2].identity == "colours-1"


def test_it_is_searched_across(encoder: Encoder, folder: Path) -> None:
    mmalign.register_modality(COLOURS, Colours)
    path = folder.parent / "s.store"
    mmalign.embed(encoder, folder, path)
    for indexed in (False, True):
        if indexed:
            parts = mmalign.build_index(path)["modalities"]
            assert set(parts) == {"image", "text", "colours"}
        searcher = mmalign.Searcher.open(path, encoder.source)
        by_text = searcher.search("sunset", to="colours")
        assert {hit.id for hit in by_text} == {"things/warm.colours", "things/cold.colours"}
        assert all(hit.caption is None and len(hit.position or ()) == 2 for hit in by_text)
        (best, _) = searcher.search(folder / "cold.colours", to="colours")
        assert (best.id, best.position) == ("things/cold.colours", (0.0, 1.0))
        assert best.score == pytest.approx(1, abs=1e-3)
        assert len(searcher.search(folder / "cold.colours")) == 3
        (by_row, _) = searcher.search(mmalign.Row("things/cold.colours"), to="colours")
        assert by_row.id == "things/cold.colours"
        (text, *_) = searcher.search(folder / "warm.colours", to="text", where="id like '%warm%'")
        assert text.caption == "sunset colours"
    with pytest.raises(UsageError, match="no 'colour' vectors to search: did you mean 'colours'"):
        searcher.search("sunset", to="colour")
    vectors = encoder.encode([folder / "cold.colours", "a dog", folder / "0.jpg"])
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    with pytest.raises(DataError, match=r"bad\.colours: cannot be used as a colours: no colours"):
        encoder.encode([folder / "bad.colours"])


def test_a_moved_file_keeps_its_vectors(encoder: Encoder, folder: Path) -> None:
    mmalign.register_modality(COLOURS, Colours)
    path = folder.parent / "s.store"
    mmalign.embed(encoder, folder, path)
    before = open_store(path)
    warm = before.column("id").index("things/warm.colours")
    count = Colours.encoded
    (folder / "warm.colours").rename(folder / "hot.colours")
    (folder / "warm.txt").rename(folder / "hot.txt")
    report = mmalign.embed(encoder, folder, path)
    assert (report.moved, Colours.encoded) == (1, count)
    after = open_store(path)
    (hot,) = after.find(["things/hot.colours"])
    for of in ("vectors_of", "positions_of"):
        moved = getattr(after, of)("colours", int(hot))
        assert np.array_equal(moved, getattr(before, of)("colours", warm))


def test_it_may_come_to_a_store_later(encoder: Encoder, folder: Path) -> None:
    path = folder.parent / "s.store"
    first = mmalign.embed(encoder, folder, path)
    assert (first.added, first.passed_over) == (3, 3)
    mmalign.build_index(path)
    mmalign.register_modality(COLOURS, Colours)
    assert mmalign.embed(encoder, folder, path).added == 2
    store = open_store(path)
    assert [len(part) for part in store.vectors("colours")] == [0, 4]
    assert store.owners("colours").tolist() == [3, 4, 4, 4]
    searcher = mmalign.Searcher.open(path, encoder.source)
    assert len(searcher.search("sunset", to="colours")) == 2
    assert len(searcher.search("sunset")) == 3
    compact(path)
    assert open_store(path).owners("colours").tolist() == [3, 4, 4, 4]
    assert len(mmalign.Searcher.open(path, encoder.source).search("sunset", to="colours")) == 2


def test_where_it_is_not_installed_the_rest_goes_on(encoder: Encoder, folder: Path) -> None:
    path = folder.parent / "s.store"
    mmalign.register_modality(COLOURS, Colours)
    mmalign.embed(encoder, folder, path)
    for name in (table._known, modalities._makers):
        del name["colours"]  # type: ignore[attr-defined]
    table._by_suffix.clear()
    (folder / "3.jpg").write_bytes(jpeg(3))
    report = mmalign.embed(encoder, folder, path)
    assert (report.added, report.passed_over, report.rows) == (1, 3, 6)
    searcher = mmalign.Searcher.open(path, encoder.source)
    assert len(searcher.search("sunset", to="colours")) == 2
    assert len(searcher.search(mmalign.Row("things/warm.colours"))) == 4
    assert set(mmalign.build_index(path)["modalities"]) == {"image", "text", "colours"}
    told = call("info", path).stdout
    assert "4 image, 7 text, 4 colours (a modality that is not installed here)" in told
    with pytest.raises(UsageError, match="cannot encode 'colours': import or install what"):
        modalities.encoder_of(encoder, "colours")


def test_another_tower_is_refused(
    encoder: Encoder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder.parent / "s.store"
    mmalign.register_modality(COLOURS, Colours)
    mmalign.embed(encoder, folder, path)

    class Better(Colours):
        version = 2

    mmalign.register_modality(COLOURS, Better)
    (folder / "new.colours").write_text("#ffffff")
    with pytest.raises(
        IdentityError, match="colours vectors of the tower colours-1, the model has"
    ):
        mmalign.embed(encoder, folder, path)
    card = modalities.model_card(encoder)
    assert len(open_store(path)) == 5
    with Writer(path, card):  # one that writes no colours does not care
        pass


class Regions(ImageEncoder):
    """An image as a whole, and its four quarters."""

    def decode(self, content: bytes, *, thumbnail: bool = False) -> mmalign.Decoded:
        halves = ((0, 0.5), (0.5, 1))
        boxes_V4 = [(0, 0, 1, 1), *((x, y, u, v) for y, v in halves for x, u in halves)]
        with image_of(content) as image:
            sizes = np.tile(image.size, 2)
            regions = [image.crop((np.array(box) * sizes).astype(int).tolist()) for box in boxes_V4]
        parts = [fit_image(region, *self.fit) for region in regions]
        return mmalign.Decoded(parts, np.array(boxes_V4, np.float32))


def test_regions_of_images_are_found_and_rows_are_counted(encoder: Encoder, folder: Path) -> None:
    mmalign.register_modality(mmalign.Modality("image", position="box"), Regions)
    path = folder.parent / "s.store"
    mmalign.embed(encoder, folder, path, precision="float32")
    assert open_store(path).owners("image").tolist() == [0] * 5 + [1] * 5 + [2] * 5
    mmalign.build_index(path)
    searcher = mmalign.Searcher.open(path, encoder.source)
    with image_of(folder / "1.jpg") as image:
        corner = image.crop((20, 0, 40, 15))
        assert image.size == (40, 30)
    hits = searcher.search(corner)
    assert len({hit.id for hit in hits}) == len(hits) == 3
    assert (hits[0].id, hits[0].position) == ("things/1.jpg", (0.5, 0, 1, 0.5))
    assert hits[0].score == pytest.approx(1, abs=1e-3)


def test_training_and_evaluation_pass_it_over(folder: Path) -> None:
    mmalign.register_modality(COLOURS, Colours)
    found = scan(folder, need_captions=True)
    assert [r.id for r in found.records] == ["things/0.jpg", "things/1.jpg", "things/2.jpg"]
    assert {(s.reason, s.affects) for s in found.skips} == {("not an image: colours", "extension")}


@pytest.mark.parametrize(
    ("modality", "said"),
    [
        (mmalign.Modality("Sound"), "'Sound' is no name for a modality"),
        (mmalign.Modality("row"), "'row' is no name for a modality"),
        (mmalign.Modality("sound", position="hours"), "position='hours'"),
        (mmalign.Modality("sound", suffixes=("wav",)), "'wav' is no suffix: write it like '.wav'"),
        (mmalign.Modality("sound", suffixes=(".JPG",)), "'.JPG' is no suffix"),
        (mmalign.Modality("sound", suffixes=(".jpg",)), ".jpg files are read in another way"),
        (mmalign.Modality("sound", suffixes=(".txt",)), ".txt files are read in another way"),
        (mmalign.Modality("sound", suffixes=(".colours",)), ".colours files belong to 'colours'"),
    ],
)
def test_what_cannot_be_registered(modality: mmalign.Modality, said: str) -> None:
    mmalign.register_modality(COLOURS, Colours)
    with pytest.raises(UsageError) as error:
        mmalign.register_modality(modality, Colours)
    assert said in str(error.value)
    assert table.find("sound") is None


def test_an_installed_package_brings_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("no module named 'audio'")

    def good() -> None:
        mmalign.register_modality(COLOURS, Colours)

    points = [
        types.SimpleNamespace(name="sound", value="sounds:all", load=broken),
        types.SimpleNamespace(name="colours", value="colours", load=good),
    ]
    monkeypatch.setattr(table, "entry_points", lambda group: points)
    monkeypatch.setattr(table, "_load_installed", table._load_installed.__wrapped__)
    found = []
    monkeypatch.setattr(table, "say", found.append)
    assert table.of_file("x/warm.COLOURS") == COLOURS
    assert found[0] == (
        "warning: the modality sound (sounds:all) cannot be loaded: no module named 'audio'"
    )


def test_the_command_line_takes_its_files(encoder: Encoder, folder: Path) -> None:
    mmalign.register_modality(COLOURS, Colours)
    path = folder.parent / "s.store"
    report = answer("embed", "--model", encoder.source, "--data", folder, "--out", path)
    assert report["added"] == 5
    found = answer("search", path, folder / "cold.colours", "--to", "colours")
    assert found["hits"][0]["id"] == "things/cold.colours"


def test_an_entry_point_is_found(folder: Path) -> None:
    """In a process of its own, as what is installed is looked for once."""
    site = folder.parent / "site"
    (site / "colours-1.0.dist-info").mkdir(parents=True)
    (site / "colours-1.0.dist-info" / "METADATA").write_text("Name: colours\nVersion: 1.0\n")
    (site / "colours-1.0.dist-info" / "entry_points.txt").write_text(
        "[mmalign.modalities]\ncolours = bring_colours\n"
    )
    (site / "bring_colours.py").write_text(
        "import mmalign\n"
        "modality = mmalign.Modality('colours', suffixes=('.colours',))\n"
        "mmalign.register_modality(modality, lambda encoder: None)\n"
    )
    code = "from mmalign.items import kind_of; from pathlib import Path; "
    code += "print(kind_of(Path('a.colours')), kind_of(Path('a.jpg')))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *sys.path])}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=env)
    assert (done.stdout, done.stderr) == ("colours image\n", "")
