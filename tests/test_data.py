"""The data room: sources in, records and pixels out, and a reason for everything left out."""

import functools
import io
import json
import os
import tarfile
import threading
import time
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import write_tar
from PIL import Image, ImageFile

from mmalign.data import (
    Augment,
    Catalog,
    Pixels,
    Record,
    Sampler,
    Skip,
    decode_all,
    decode_stream,
    fit_image,
    open_image,
    read_ahead,
    read_image,
    report_skips,
    scan,
)
from mmalign.errors import DataError

STILL = Augment(crop_min=1, flip=False, colour=0, erase=0)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Encode an image."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Draw a noisy picture; each seed another."""
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def jpeg(seed: int = 0) -> bytes:
    return encoded(noise(seed), "JPEG")


@functools.cache
def huge_png() -> bytes:
    """A whole 20,000 x 20,000 PNG of one bit a pixel: 50 KB that decode to 400 MB."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + check

    side = (20_000).to_bytes(4, "big")
    rows = zlib.compress(bytes((1 + 20_000 // 8) * 20_000))
    header = chunk(b"IHDR", side * 2 + bytes([1, 0, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def write_folder(folder: Path, members: dict[str, bytes | str]) -> Path:
    """Write files at relative paths."""
    for name, content in members.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def listed(*sources: Path | str, **options: Any) -> Catalog:
    return scan([str(s) for s in sources], **options)


def captions(catalog: Catalog) -> dict[str, tuple[str, ...]]:
    return {r.id: r.captions for r in catalog.records}


def reasons(skips: list[Skip]) -> dict[str, str]:
    return {s.id: s.reason for s in skips}


def side_8(content: bytes) -> Any:
    return fit_image(open_image(content), 8)


# ---------------------------------------------------------------- sources


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_folder(
        tmp_path / "photos",
        {
            "a.jpg": jpeg(0),
            "a.txt": "one\n\n  two \none\n",
            "deep/er/b.PNG": encoded(noise(1)),
            "deep/er/b.json": json.dumps({"captions": ["x", "y"], "zh": "图", "year": 1999}),
            "deep/c.webp": encoded(noise(2), "WEBP"),
            "deep/c.TXT": "upper case",
            ".hidden/d.jpg": jpeg(3),
            ".e.jpg": jpeg(4),
            "notes.md": "no picture",
        },
    )


def test_folder_is_read_with_captions_beside_the_images(photos: Path) -> None:
    catalog = listed(photos)
    assert captions(catalog) == {
        "photos/a.jpg": ("one", "two"),
        "photos/deep/c.webp": ("upper case",),
        "photos/deep/er/b.PNG": ("x", "y"),
    }
    assert catalog.skips == []
    deepest = catalog.records[-1]
    assert deepest.uri == str(photos / "deep/er/b.PNG")
    assert deepest.meta == {"zh": "图", "year": 1999}
    assert read_image(deepest) == (photos / "deep/er/b.PNG").read_bytes()


def test_caption_keys_pick_and_join(photos: Path) -> None:
    other = listed(photos, caption_keys=("zh",), need_captions=True)
    assert captions(other) == {"photos/deep/er/b.PNG": ("图",)}
    assert set(reasons(other.skips).values()) == {"no caption"}
    joined = listed(photos, caption_keys=("captions", "zh"))
    assert captions(joined)["photos/deep/er/b.PNG"] == ("x", "y", "图")
    assert captions(joined)["photos/a.jpg"] == ("one", "two")


def test_no_caption_anywhere_names_the_key(photos: Path) -> None:
    with pytest.raises(DataError, match=r"3 no caption; captions were .* under captions_de .*-key"):
        listed(photos, caption_keys=("captions_de",), need_captions=True)


@pytest.mark.parametrize("broken", ['{"captions": ["a", {"b": 1}]}', "{", "[]", '"\\ud83d"'])
def test_broken_json_costs_the_captions_only(tmp_path: Path, broken: str) -> None:
    folder = write_folder(tmp_path / "f", {"a.jpg": jpeg(), "a.json": broken})
    catalog = listed(folder)
    assert captions(catalog) == {"f/a.jpg": ()}
    assert [s.kept for s in catalog.skips] == [True]


def test_half_a_character_is_no_caption(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", {"a.jpg": jpeg(), "a.json": '{"caption": "cut \\ud83d"}'})
    catalog = listed(folder)
    assert catalog.records[0].captions == ()
    assert reasons(catalog.skips) == {"f/a.jpg": "caption is not UTF-8 (character 4)"}


def test_numbers_and_nulls_among_captions(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path / "f",
        {"a.jpg": jpeg(), "a.json": '{"captions": ["a", null, 7]}', "b.jpg": jpeg(1)},
    )
    (folder / "b.json").write_text('{"caption": 7}')
    assert captions(listed(folder)) == {"f/a.jpg": ("a", "7"), "f/b.jpg": ("7",)}


def test_links_are_followed_once(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", {"own/a.jpg": jpeg()})
    other = write_folder(tmp_path / "elsewhere", {"b.jpg": jpeg(1)})
    (folder / "there").symlink_to(other)
    (folder / "own" / "back").symlink_to(folder)
    (folder / "own" / "a.txt").symlink_to(tmp_path / "gone")
    catalog = listed(folder)
    assert list(captions(catalog)) == ["f/own/a.jpg", "f/there/b.jpg"]
    assert reasons(catalog.skips)["f/own/a.jpg"].startswith("captions cannot be read: No such file")


def test_a_folder_that_cannot_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "f", {"a.jpg": jpeg(), "locked/b.jpg": jpeg(1)})
    scandir = os.scandir

    def refusing(path: str) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    catalog = listed(folder)
    assert list(captions(catalog)) == ["f/a.jpg"]
    assert reasons(catalog.skips) == {"f/locked": "folder cannot be read: Permission denied"}


def test_names_that_are_not_utf8_can_be_stored_and_read(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    try:
        Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jpg")).write_bytes(jpeg())
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (record,) = listed(folder).records
    assert record.id == "f/caf\\udce9.jpg"
    assert record.uri.encode().endswith(b"udce9.jpg")
    assert read_image(record) == jpeg()


def test_foreign_images_and_orphans_are_named(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path / "f", {"a.jpg": jpeg(), "b.heic": b"x", "c.txt": "alone", "d.svg": "<svg/>"}
    )
    assert reasons(listed(folder).skips) == {
        "f/b.heic": "image type not supported: .heic",
        "f/c.txt": "caption without an image",
        "f/d.svg": "image type not supported: .svg",
    }


def sample(key: str, seed: int, caption: str = "words") -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", jpeg(seed)), (f"{key}.txt", caption.encode())]


def test_tars_by_brace_and_glob(tmp_path: Path) -> None:
    for i in range(3):
        write_tar(tmp_path / f"s-{i}.tar", sample("k", i, f"caption {i}"))
    by_brace = listed(tmp_path / "s-{0..2}.tar")
    assert captions(by_brace) == {f"s-{i}/k": (f"caption {i}",) for i in range(3)}
    assert [read_image(r) for r in by_brace.records] == [jpeg(i) for i in range(3)]
    assert listed(tmp_path / "s-*.tar") == by_brace
    with pytest.raises(DataError, match=r"s-\{1\.\.3\}\.tar: no such file or folder"):
        listed(tmp_path / "s-{1..3}.tar")


def test_equal_ids_of_two_sources_lose_nothing(tmp_path: Path) -> None:
    (tmp_path / "u").mkdir()
    (tmp_path / "v").mkdir()
    first = write_tar(tmp_path / "u" / "s.tar", sample("k", 0))
    second = write_tar(tmp_path / "v" / "s.tar", sample("k", 1))
    catalog = listed(first, second)
    assert [r.id for r in catalog.records] == ["s/k", f"{second}#k.jpg"]
    assert [read_image(r) for r in catalog.records] == [jpeg(0), jpeg(1)]
    again = listed(first, second, first)
    assert again.records == catalog.records
    assert reasons(again.skips) == {"s/k": "given twice"}


def test_truncated_tar_gives_what_is_whole(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "s.tar", [m for i in range(4) for m in sample(f"k{i}", i)])
    with tarfile.open(tar) as whole:
        cut = whole.getmember("k2.jpg").offset_data + 100
    tar.write_bytes(tar.read_bytes()[:cut])
    catalog = listed(tar)
    assert list(captions(catalog)) == ["s/k0", "s/k1"]
    assert [read_image(r) for r in catalog.records] == [jpeg(0), jpeg(1)]
    why = [s.reason for s in catalog.skips]
    assert "tar ends in the middle of it" in why
    assert any(reason.startswith("tar breaks off") for reason in why)


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100])
def test_what_is_no_tar_is_said_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"s\.tar: cannot be read as a tar"):
        listed(tmp_path / "s.tar")


@pytest.mark.parametrize("shape", ["bytes", "struct"])
def test_parquet_with_image_bytes(tmp_path: Path, shape: str) -> None:
    images: list[Any] = [jpeg(i) for i in range(5)]
    if shape == "struct":
        images = [{"bytes": b, "path": "x.jpg"} for b in images]
    table = pa.table({"image": images, "text": [f"t{i}" for i in range(5)], "year": range(5)})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    catalog = listed(tmp_path / "t.parquet")
    assert list(captions(catalog).values()) == [(f"t{i}",) for i in range(5)]
    assert len({r.id for r in catalog.records}) == 5
    assert catalog.records[3].meta == {"year": 3}
    # Backwards, as the cells of a row group are cached.
    assert [read_image(r) for r in catalog.records[::-1]] == [jpeg(i) for i in range(5)][::-1]


def test_parquet_written_anew_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "t.parquet"
    for seeds in ([0, 1], [2, 3, 4]):
        pq.write_table(pa.table({"jpg": [jpeg(i) for i in seeds]}), file)
        assert [read_image(r) for r in listed(file).records] == [jpeg(i) for i in seeds]


def test_parquet_with_null_bytes_and_with_paths(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a.jpg": jpeg(7)})
    pq.write_table(pa.table({"bytes": [jpeg(0), None]}), tmp_path / "t.parquet")
    lost = [i for _, i in decode_stream(listed(tmp_path / "t.parquet").records, side_8, 2)][1]
    assert isinstance(lost, Skip)
    assert lost.reason == "no image bytes"
    table = pa.table({"path": ["a.jpg", None], "captions": [["x", None, "y"], ["z"]]})
    pq.write_table(table, tmp_path / "p.parquet")
    catalog = listed(tmp_path / "p.parquet")
    assert captions(catalog) == {"p/a.jpg": ("x", "y")}
    assert read_image(catalog.records[0]) == jpeg(7)
    assert [s.reason for s in catalog.skips] == ["no image path"]


def test_csv_rows_of_one_image_are_one_sample(tmp_path: Path) -> None:
    write_folder(tmp_path, {"i/a.jpg": jpeg(0), "i/b.jpg": jpeg(1)})
    rows = 'id,image,caption,n\n1,i/a.jpg,"one, two",4\n2,i/b.jpg,b\u2028c,5\n3,i/a.jpg,three,6\n'
    (tmp_path / "c.csv").write_text(rows)
    catalog = listed(tmp_path / "c.csv")
    assert captions(catalog) == {"c/1": ("one, two", "three"), "c/2": ("b\u2028c",)}
    assert catalog.records[0].meta == {"n": "4"}
    assert read_image(catalog.records[1]) == jpeg(1)


def test_equal_ids_in_a_table_lose_nothing(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("id,image,caption\n1,a.jpg,x\n1,b.jpg,y\n,c.jpg,z\n")
    catalog = listed(tmp_path / "c.csv")
    assert captions(catalog) == {"c/1": ("x",), f"{tmp_path}/b.jpg": ("y",), "c/c.jpg": ("z",)}
    assert catalog.skips == []


def test_tsv_and_a_caption_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "c.tsv").write_bytes(b"\xef\xbb\xbffile\ttitle\na.jpg\tfine\nb.jpg\tcaf\xe9\n")
    catalog = listed(tmp_path / "c.tsv")
    assert captions(catalog) == {"c/a.jpg": ("fine",), "c/b.jpg": ()}
    assert reasons(catalog.skips) == {"c/b.jpg": "caption is not UTF-8 (byte 3)"}


def test_an_open_quote_does_not_swallow_rows(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text('image,caption\na.jpg,x\nb.jpg,"y\nc.jpg,z\n')
    with pytest.raises(DataError, match=r"c\.csv: .* starts in line 3: unexpected end .* quote"):
        listed(tmp_path / "c.csv")


def test_jsonl_with_broken_lines(tmp_path: Path) -> None:
    lines = ['{"id": 0, "url": "a.jpg", "captions": ["x", "y"]}', "{torn", "", "[1]"]
    (tmp_path / "c.jsonl").write_text("\n".join([*lines, '{"url": "b.jpg"}', '{"id": 5}']))
    catalog = listed(tmp_path / "c.jsonl")
    assert captions(catalog) == {"c/0": ("x", "y"), "c/b.jpg": ()}
    rows = {s.uri.rsplit("=", 1)[1]: s.reason.split(":")[0] for s in catalog.skips}
    assert rows == {
        "1": "line is not valid JSON",
        "3": "line holds no JSON object",
        "5": "no image path",
    }


@pytest.fixture
def memory() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def test_memory_folder_tar_and_table(memory: Any, tmp_path: Path) -> None:
    memory.pipe("/pics/sub/a.jpg", jpeg(0))
    memory.pipe("/pics/sub/a.txt", b"far away")
    for i in (1, 2):
        members = [*sample("k0", 9), *sample("k", i)]
        memory.pipe(f"/s-{i}.tar", write_tar(tmp_path / "s.tar", members).read_bytes())
    memory.pipe("/c.csv", b"image,caption\nmemory://pics/sub/a.jpg,from a table\n")
    pq.write_table(pa.table({"jpg": [jpeg(3)]}), tmp_path / "t.parquet")
    memory.pipe("/t.parquet", (tmp_path / "t.parquet").read_bytes())

    for source, words, seed in (
        ("memory://pics", "far away", 0),
        ("memory://s-{1..1}.tar", "words", 1),
        ("memory://s-*.tar", "words", 2),
        ("memory://c.csv", "from a table", 0),
        ("memory://t.parquet", None, 3),
    ):
        last = listed(source).records[-1]
        assert last.captions == ((words,) if words else ())
        assert read_image(last) == jpeg(seed), source
    assert len(listed("memory://s-*.tar").records) == 4


def test_what_is_gone_from_a_url_is_a_skip(memory: Any) -> None:
    memory.pipe("/pics/a.jpg", jpeg())
    (record,) = listed("memory://pics").records
    memory.rm("/pics/a.jpg")
    ((_, lost),) = decode_stream([record], side_8, 1)
    assert isinstance(lost, Skip)
    assert lost.reason.startswith("cannot be read")


def test_missing_columns_are_listed(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("picture,words\na.jpg,x\n")
    with pytest.raises(DataError, match=r"no image column; it has picture, words; looked for im"):
        listed(tmp_path / "c.csv")
    (tmp_path / "d.csv").write_text("image,words\na.jpg,x\n")
    with pytest.raises(DataError, match="no caption"):
        listed(tmp_path / "d.csv", need_captions=True)
    assert captions(listed(tmp_path / "d.csv", caption_keys=("words",))) == {"d/a.jpg": ("x",)}


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.jsonl"])
def test_a_broken_table_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PAR1\x00\x01" * 10)
    with pytest.raises(DataError, match=name) as caught:
        listed(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("foo://bucket/x.tar", "cannot be opened: Protocol not known: foo"),
        ("memory://none/*.tar", "no such file or folder$"),
        ("memory://none.tar", "cannot be read as a tar"),
        ("memory://none", "no images found"),
        ("a{1", "[Uu]nbalanced braces"),
        ("nowhere/at/all", r"no such file or folder \(nowhere/at does not exist\)"),
        ("x" * 300, "no such file or folder"),
    ],
)
def test_sources_that_are_none(source: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        listed(source)
    assert str(caught.value).startswith(source)


def test_a_typo_and_a_file_of_no_kind(tmp_path: Path) -> None:
    write_folder(tmp_path, {"photos/a.txt": "x", "one.jpg": jpeg()})
    with pytest.raises(DataError, match="fotos: no such file or folder: did you mean 'photos'"):
        listed(tmp_path / "fotos")
    with pytest.raises(DataError, match=r"one\.jpg: not a source: give a folder"):
        listed(tmp_path / "one.jpg")
    with pytest.raises(DataError, match="no usable sample: 1 caption without an image"):
        listed(tmp_path / "photos")


# ---------------------------------------------------------------- batches


def sampler(rows: int = 12, each: int = 3, batch: int = 4, drawn: int = 2) -> Sampler:
    return Sampler(
        np.arange(rows + 1, dtype=np.int64) * each, batch, seed=5, captions_per_image=drawn
    )


def test_every_row_once_an_epoch() -> None:
    draws = sampler().draws()
    orders = []
    for _ in range(3):
        rows = np.concatenate([next(draws).rows_B for _ in range(3)])
        assert sorted(rows) == list(range(12))
        orders.append(tuple(rows))
    assert len(set(orders)) == 3


def test_an_incomplete_batch_is_left_out_not_repeated() -> None:
    draws = sampler(rows=14).draws()
    rows = np.concatenate([next(draws).rows_B for _ in range(3)])
    assert len(set(rows.tolist())) == 12


def test_draws_resume_at_any_step() -> None:
    stream = sampler().draws()
    whole = [next(stream) for _ in range(10)]
    for first in range(10):
        resumed = sampler().draws(first)
        for wanted in whole[first:]:
            got = next(resumed)
            assert got.step == wanted.step
            assert np.array_equal(got.rows_B, wanted.rows_B)
            assert np.array_equal(got.captions_BC, wanted.captions_BC)
    other = next(Sampler(sampler().starts, 4, seed=6).draws())
    assert not np.array_equal(other.rows_B, whole[0].rows_B)


def test_captions_are_the_rows_own_without_repeats() -> None:
    counts = np.array([1, 2, 3, 7, 5, 4])
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    seen: dict[int, set[int]] = {row: set() for row in range(6)}
    draws = Sampler(starts, 6, seed=0, captions_per_image=3).draws()
    for _ in range(60):
        draw = next(draws)
        assert draw.captions_BC.shape == (6, 3)
        for row, drawn in zip(draw.rows_B.tolist(), draw.captions_BC.tolist(), strict=True):
            assert all(starts[row] <= c < starts[row + 1] for c in drawn)
            assert len(set(drawn)) == min(3, counts[row])
            seen[row] |= set(drawn)
    assert [len(seen[row]) for row in range(6)] == counts.tolist()


def test_read_ahead_keeps_order_and_runs_ahead() -> None:
    made: list[int] = []

    def make(item: int) -> int:
        made.append(item)
        return item * item

    stream = read_ahead(make, iter(range(20)), depth=3)
    assert next(stream) == 0
    time.sleep(0.3)
    assert 3 <= len(made) <= 6
    assert list(stream) == [i * i for i in range(1, 20)]


def test_read_ahead_passes_errors_on() -> None:
    def make(item: int) -> int:
        if item == 2:
            raise ZeroDivisionError("at two")
        return item

    stream = read_ahead(make, iter(range(5)))
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(ZeroDivisionError, match="at two"):
        next(stream)

    def broken() -> Iterator[int]:
        yield 1
        raise OSError("source is gone")

    with pytest.raises(OSError, match="source is gone"):
        list(read_ahead(lambda i: i, broken()))


def test_read_ahead_closed_early_leaves_no_thread() -> None:
    stream = read_ahead(lambda i: i, iter(range(10**9)), depth=2)
    assert next(stream) == 0
    started = time.monotonic()
    stream.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 2
    assert not [t for t in threading.enumerate() if t.name == "read_ahead"]


# ---------------------------------------------------------------- decoding


def mean_colour(content: bytes) -> list[int]:
    return np.asarray(open_image(content)).reshape(-1, 3).mean(0).round().astype(int).tolist()


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (30, 20), "black")
    image.paste("white", (0, 0, 10, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    upright = open_image(encoded(image, "PNG", exif=exif))
    assert upright.size == (20, 30)
    pixels = np.asarray(upright)
    assert (pixels[:10] == 255).all()
    assert (pixels[10:] == 0).all()


def test_cmyk_and_grey() -> None:
    red, green, blue = mean_colour(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert red > 230
    assert green < 30
    assert blue < 30
    assert mean_colour(encoded(Image.new("L", (8, 8), 90))) == [90, 90, 90]
    assert mean_colour(encoded(Image.new("1", (8, 8), 1))) == [255, 255, 255]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    ramp = np.linspace(0, 65_535, 256).astype(np.uint16).reshape(16, 16)
    pixels = np.asarray(open_image(encoded(Image.fromarray(ramp), kind)))
    assert np.abs(pixels[..., 0].ravel().astype(int) - np.arange(256)).max() <= 1


def test_transparency_lies_on_white() -> None:
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half.paste((0, 0, 255, 255), (0, 0, 4, 8))
    pixels = np.asarray(open_image(encoded(half)))
    assert (pixels[:, :4] == (0, 0, 255)).all()
    assert (pixels[:, 4:] == 255).all()
    assert mean_colour(encoded(Image.new("LA", (8, 8), (0, 0)))) == [255, 255, 255]
    assert mean_colour(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 51)))) == [204, 204, 204]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_palette_with_alpha_lies_on_white(transparency: int | bytes) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 0, 200, 0])
    image.paste(0, (0, 0, 4, 8))
    pixels = np.asarray(open_image(encoded(image, "PNG", transparency=transparency)))
    assert (pixels[:, :4] == 0).all()
    assert (pixels[:, 4:] == 255).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), c) for c in ((0, 0, 255), (255, 0, 0), (0, 255, 0))]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    assert getattr(Image.open(io.BytesIO(content)), "n_frames", 1) == 3
    assert np.allclose(mean_colour(content), (0, 0, 255), atol=4)


def test_truncated_jpeg_has_its_reason() -> None:
    content = encoded(noise(size=(200, 200)), "JPEG")
    open_image(content)
    with pytest.raises(DataError, match="damaged image: .*truncated"):
        open_image(content[: len(content) // 2])


@pytest.mark.parametrize("content", [b"", b"<svg xmlns='x'/>", b"just words"])
def test_what_is_no_image_shows_how_it_starts(content: bytes) -> None:
    with pytest.raises(DataError, match="not an image: starts with") as caught:
        open_image(content)
    assert repr(content[:12]) in str(caught.value)


def test_huge_images_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[object] = []
    content = jpeg()
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", decoded.append)
        for refused in (huge_png(), content):
            with pytest.raises(DataError, match="too many pixels"):
                open_image(refused, max_pixels=1199)
    assert decoded == []
    with pytest.raises(DataError, match="too many pixels"):
        open_image(huge_png())
    with pytest.raises(DataError, match="too many pixels: 40 x 30"):
        open_image(jpeg(), max_pixels=1199)
    assert open_image(jpeg(), max_pixels=1200).size == (40, 30)


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(40, 30), (31, 77), (64, 64), (200, 201), (17, 90)])
def test_fit_image_equals_open_clip(mode: str, interpolation: str, size: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from open_clip.transform import PreprocessCfg, image_transform_v2
    cfg = PreprocessCfg(
        size=32, mean=(0, 0, 0), std=(1, 1, 1), interpolation=interpolation, resize_mode=mode
    )
    image = noise(1, size)
    theirs = image_transform_v2(cfg, is_train=False)(image)
    ours = torch.from_numpy(fit_image(image, 32, mode, interpolation).copy())
    assert torch.equal(ours.permute(2, 0, 1), (theirs * 255).round().to(torch.uint8))


def test_longest_pads_and_unknown_mode_is_refused() -> None:
    pixels = fit_image(Image.new("RGB", (40, 20), "white"), 32, "longest", fill=(1, 2, 3))
    assert (pixels[:8] == (1, 2, 3)).all()
    assert (pixels[24:] == (1, 2, 3)).all()
    assert (pixels[8:24] == 255).all()
    with pytest.raises(ValueError, match="unknown resize mode 'wide'"):
        fit_image(noise(), 32, "wide")


def test_a_thread_of_an_image_is_refused_where_scaling_would_blow_it_up() -> None:
    line = Image.new("RGB", (1, 60_000))
    with pytest.raises(DataError, match="too narrow to scale: 1 x 60000"):
        fit_image(line, 224, "shortest")
    assert fit_image(line, 224, "squash").shape == (224, 224, 3)


# ---------------------------------------------------------------- pixels


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    """Six images, of which numbers 1 and 4 cannot be decoded."""
    write_folder(tmp_path / "f", {f"{i}.jpg": b"no" if i in (1, 4) else jpeg(i) for i in range(6)})
    return listed(tmp_path / "f").records


def test_cache_equals_direct_decoding(records: list[Record], tmp_path: Path) -> None:
    pixels, skips = decode_all(records, side_8, 8, tmp_path / "c" / "c.npy", workers=3)
    good = [records[i] for i in (0, 2, 3, 5)]
    assert pixels.records == good
    assert [s.id for s in skips] == ["f/1.jpg", "f/4.jpg"]
    rows = np.array([3, 0, 2])
    images, places, lost = pixels.fetch(rows)
    assert places == [0, 1, 2]
    assert lost == []
    direct, _, _ = Pixels(good, side_8, None, 3).fetch(rows)
    assert np.array_equal(images, direct)
    assert np.array_equal(direct, [side_8(jpeg(i)) for i in (5, 0, 3)])


def test_without_a_cache_fetch_drops_and_reports(records: list[Record]) -> None:
    images, places, lost = Pixels(records, side_8, None, 3).fetch(np.array([4, 3, 1, 0]))
    assert places == [1, 3]
    assert np.array_equal(images, [side_8(jpeg(3)), side_8(jpeg(0))])
    assert [s.id for s in lost] == ["f/4.jpg", "f/1.jpg"]
    assert all(s.reason.startswith("not an image") for s in lost)
    with pytest.raises(DataError, match="none of 2 images can be decoded: not an image"):
        Pixels(records, side_8, None, 3).fetch(np.array([4, 1]))


def test_no_room_for_a_cache_means_none(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmalign.data.pixels.DISK_SHARE", 0.0)
    pixels, skips = decode_all(records, side_8, 8, tmp_path / "c.npy", workers=1)
    assert pixels.cache_NSS3 is None
    assert (pixels.records, skips) == (records, [])
    assert not (tmp_path / "c.npy").exists()


def test_more_workers_than_samples_and_early_stop(records: list[Record]) -> None:
    kinds = [isinstance(item, Skip) for _, item in decode_stream(records[:2], side_8, 16)]
    assert kinds == [False, True]
    assert list(decode_stream([], side_8, 4)) == []
    stream = decode_stream(records * 50, side_8, 2)
    assert next(stream)[0] == records[0]
    before = time.monotonic()
    stream.close()  # type: ignore[attr-defined]
    assert time.monotonic() - before < 1


def test_decode_stream_keeps_order_and_is_bounded(records: list[Record]) -> None:
    started: list[int] = []

    def slow_first(content: bytes) -> int:
        started.append(len(content))
        time.sleep(0.05 if len(started) == 1 else 0)
        return len(content)

    many = [records[i % 6] for i in range(100)]
    stream = decode_stream(many, slow_first, 2)
    first = next(stream)
    assert len(started) <= 10
    got = [first, *stream]
    assert [record for record, _ in got] == many
    assert [size for _, size in got] == [len(read_image(r)) for r in many]


def test_a_bug_in_a_decoder_is_not_a_skip(records: list[Record]) -> None:
    def broken(content: bytes) -> int:
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        list(decode_stream(records, broken, 2))


# ---------------------------------------------------------------- augmentation


def batch(count: int = 64, side: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "augment",
    [Augment(), Augment(flip=True, colour=0.9, erase=1.0), Augment(crop_min=0.05, aspect=3), STILL],
)
@pytest.mark.parametrize("side", [16, 24])
def test_augment_keeps_shape_and_range(augment: Augment, side: int) -> None:
    out = augment(batch(), side, seeded())
    assert out.shape == (64, 3, side, side)
    assert out.dtype == torch.float32
    assert out.min() >= 0
    assert out.max() <= 255


def test_augment_with_everything_off_is_the_identity() -> None:
    assert torch.equal(STILL(batch(), 24, seeded()), batch().float())
    flat = torch.full((2, 3, 24, 24), 77, dtype=torch.uint8)
    assert torch.allclose(STILL(flat, 16, seeded()), torch.tensor(77.0), atol=1e-3)


@pytest.mark.parametrize(
    "augment",
    [
        Augment(crop_min=0.5, flip=False, colour=0),
        Augment(crop_min=1, flip=True, colour=0),
        Augment(crop_min=1, flip=False, colour=0.3),
        Augment(crop_min=1, flip=False, colour=0, erase=0.5),
    ],
)
def test_each_part_is_decided_by_the_generator_alone(augment: Augment) -> None:
    first = augment(batch(), 24, seeded(3))
    torch.manual_seed(99)
    assert torch.equal(first, augment(batch(), 24, seeded(3)))
    assert not torch.equal(first, augment(batch(), 24, seeded(4)))
    assert not torch.equal(first, batch().float())


def test_flip_mirrors_about_half_and_nothing_else() -> None:
    images = batch()
    out = Augment(crop_min=1, flip=True, colour=0, erase=0)(images, 24, seeded())
    same = torch.isclose(out, images.float(), atol=0.1).flatten(1).all(1)
    mirrored = torch.isclose(out, images.flip(3).float(), atol=0.1).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 16 < mirrored.sum() < 48


def test_erase_greys_a_box_in_its_share() -> None:
    out = Augment(crop_min=1, flip=False, colour=0, erase=0.5)(batch(), 24, seeded())
    changed = (out != batch().float()).any(1)
    assert (out.permute(0, 2, 3, 1)[changed] == 127).all()
    touched = changed.flatten(1).any(1)
    assert 16 < touched.sum() < 48
    assert changed.flatten(1).float().mean(1).max() <= 0.3


# ---------------------------------------------------------------- nothing is lost in silence


def corrupt_set(folder: Path) -> list[str]:
    """Write 12 good samples and one of each kind of damage, in a folder and a tar."""
    good: dict[str, bytes | str] = {}
    for i in range(12):
        good |= {f"good{i}.jpg": jpeg(i), f"good{i}.txt": f"caption {i}"}
    whole = encoded(noise(50, (200, 200)), "JPEG")
    damage: dict[str, bytes | str] = {
        "cut.jpg": whole[: len(whole) // 2],
        "cut.txt": "cut short",
        "empty.jpg": jpeg(20),
        "empty.txt": "",
        "huge.png": huge_png(),
        "huge.txt": "too big",
        "latin.jpg": jpeg(21),
        "latin.txt": "café".encode("latin-1"),
        "words.jpg": "these are words",
        "words.txt": "no picture",
    }
    write_folder(folder / "set", good | damage)
    members = [*sample("k", 30), *sample("twice", 31), *sample("twice", 32)]
    write_tar(folder / "dup.tar", members)
    return [str(folder / "set"), str(folder / "dup.tar")]


def losses(sources: list[str], need_captions: bool) -> tuple[Catalog, dict[str, str], int]:
    """Scan and decode; return the catalog, a reason by id, and how many images decoded."""
    catalog = scan(sources, need_captions=need_captions)
    stream = list(decode_stream(catalog.records, side_8, 4))
    lost = [item for _, item in stream if isinstance(item, Skip)]
    every = [*catalog.skips, *lost]
    return catalog, reasons(every), len(stream) - len(lost)


def test_every_loss_of_the_corrupt_set_has_its_reason(tmp_path: Path) -> None:
    catalog, why, decoded = losses(corrupt_set(tmp_path), need_captions=True)
    assert decoded == 12 + 2
    starts = {key: reason.split(":")[0].split(" (")[0] for key, reason in why.items()}
    assert starts == {
        "set/cut.jpg": "damaged image",
        "set/empty.jpg": "caption file is empty",
        "set/huge.png": "too many pixels",
        "set/latin.jpg": "caption is not UTF-8",
        "set/words.jpg": "not an image",
        "dup/twice": "duplicate key",
    }
    assert not any(s.kept for s in catalog.skips)


def test_without_captions_wanted_their_images_stay(tmp_path: Path) -> None:
    catalog, why, decoded = losses(corrupt_set(tmp_path), need_captions=False)
    assert decoded == 12 + 2 + 2
    assert why["set/empty.jpg"] == "caption file is empty"
    assert [s.id for s in catalog.skips if s.kept] == ["set/empty.jpg", "set/latin.jpg"]
    (twice,) = [r for r in catalog.records if r.id == "dup/twice"]
    assert read_image(twice) == jpeg(31)


def skips_of(count: int, kept: bool = False) -> list[Skip]:
    return [Skip(f"s/{i}", f"/s/{i}", f"not an image: starts with {i}", kept) for i in range(count)]


def test_more_than_one_percent_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    report_skips(skips_of(1), 100, "skipped.jsonl")
    quiet = capsys.readouterr()
    report_skips(skips_of(2), 100, "skipped.jsonl")
    loud = capsys.readouterr()
    assert quiet.err.startswith("1 of 100 samples skipped (1 not an image); listed in skipped.")
    assert loud.err.startswith("warning: 2 of 100 samples skipped (2 not an image)")
    assert quiet.out == loud.out == ""
    report_skips(skips_of(50, kept=True), 100)
    assert "warning" not in capsys.readouterr().err
    report_skips([], 100)
    assert capsys.readouterr().err == ""


def test_all_skipped_is_an_error_with_an_example() -> None:
    with pytest.raises(DataError, match="none of the 3 samples .*3 not an image; .*/s/0: not an"):
        report_skips(skips_of(3), 3)
    report_skips(skips_of(3, kept=True), 3)
