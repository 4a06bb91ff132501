"""Validation samples that are trained on too are found, by whatever way they can be."""

import io
from pathlib import Path

import pytest
from conftest import jpeg, write_pairs
from PIL import Image

from mmalign.data import Pixels, scan
from mmalign.model import new_model
from mmalign.training.leakage import describe_leakage, shared_samples
from mmalign.training.pairs import load_pairs


def pixels(folder: Path, crops: bool = False) -> Pixels:
    records = scan([str(folder)], need_captions=True).records
    encoder = new_model("nano", ["a"])
    return load_pairs(
        encoder, records, folder.parent / f"{folder.name}.npy", crops=crops, label="decode"
    )[0].pixels


def photo(seed: int, side: int = 200) -> Image.Image:
    """A picture with areas, as a photograph has, in place of noise."""
    coarse = Image.open(io.BytesIO(jpeg(seed, (6, 6)))).convert("RGB")
    return coarse.resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture
def training(tmp_path: Path) -> Pixels:
    folder = tmp_path / "train"
    folder.mkdir()
    for i in range(12):
        photo(i).save(folder / f"{i}.jpg", quality=92)
        (folder / f"{i}.txt").write_text(f"word{i}")
    return pixels(folder, crops=True)


def test_each_way_to_be_the_same_is_named(training: Pixels, tmp_path: Path) -> None:
    folder = tmp_path / "val"
    folder.mkdir()
    (folder / "copy.jpg").write_bytes((tmp_path / "train" / "3.jpg").read_bytes())
    photo(5).resize((120, 120)).save(folder / "small.png")
    photo(99).save(folder / "new.jpg")
    for name in ("copy", "small", "new"):
        (folder / f"{name}.txt").write_text(name)
    validation = pixels(folder)
    found = {
        way: [(a.uri, b.uri) for a, b in p]
        for way, p in shared_samples(training, validation).items()
    }
    names = {way: [tuple(Path(u).name for u in pair) for pair in p] for way, p in found.items()}
    assert names == {
        "the same file": [("copy.jpg", "3.jpg")],
        "the same picture": [("small.png", "5.jpg")],
    }
    said = describe_leakage(training, validation)
    assert said is not None
    assert "2 of 3 validation samples are also in the training data" in said


def test_validation_on_the_training_data_is_named(training: Pixels) -> None:
    said = describe_leakage(training, training)
    assert said is not None
    assert "all 12 validation samples are also in the training data (12 the same sample" in said


def test_other_samples_are_no_leakage_whatever_their_names(
    training: Pixels, scenes: Path, tmp_path: Path
) -> None:
    for i in range(12):
        photo(50 + i).save(write_folder(tmp_path / "other" / "train") / f"{i}.jpg")
        (tmp_path / "other" / "train" / f"{i}.txt").write_text(f"word{i}")
    assert describe_leakage(training, pixels(tmp_path / "other" / "train")) is None
    assert describe_leakage(pixels(scenes), training) is None


def write_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_plain_pictures_of_another_colour_differ(tmp_path: Path) -> None:
    for name, colour in (("train", 0), ("val", 60)):
        folder = write_folder(tmp_path / name)
        for i in range(3):
            Image.new("RGB", (64, 64), (colour + 20 * i, 0, 200)).save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text(f"word{i}")
    assert describe_leakage(pixels(tmp_path / "train"), pixels(tmp_path / "val")) is None


def test_drawn_scenes_are_told_apart(scenes: Path) -> None:
    """96 scenes on plain grounds: one half is no copy of the other."""
    every = pixels(scenes)
    halves = [
        Pixels(
            every.records[half],
            every.decode,
            None if every.cache_NSS3 is None else every.cache_NSS3[half],
            every.workers,
            every.content_hashes_N[half],
            every.perceptual_hashes_N[half],
        )
        for half in (slice(0, 48), slice(48, 96))
    ]
    assert describe_leakage(*halves) is None


def test_pairs_are_written(tmp_path: Path) -> None:
    """The helper of other tests writes pictures that are no copies either."""
    assert len(set(pixels(write_pairs(tmp_path / "p", 6)).content_hashes_N.tolist())) == 6
