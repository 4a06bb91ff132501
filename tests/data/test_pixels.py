"""Bytes in, pixels out: every kind of image, and the cache of decoded ones."""

import io
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import encoded, huge_png, jpeg, listed, noise, side_8, write_folder
from PIL import Image, ImageFile

from mmalign.data import (
    THUMBNAIL_SIDE,
    Pixels,
    Record,
    Skip,
    decode_all,
    decode_stream,
    fit_image,
    open_image,
    read_image,
)
from mmalign.errors import DataError


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


def test_an_empty_file_is_said_to_be_empty() -> None:
    with pytest.raises(DataError, match="not an image: the file is empty"):
        open_image(b"")


@pytest.mark.parametrize("content", [b"{}", b"just words"])
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
    off = (ours.permute(2, 0, 1) - theirs * 255).abs()
    assert off.max() < 1.5
    assert off.mean() < 0.02


@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_reduced_jpegs_are_near_the_whole(mode: str) -> None:
    y, x = np.mgrid[0:700, 0:1000]
    waves = np.stack(
        [127 + 120 * np.sin(x / a) * np.cos(y / b) for a, b in ((9, 30), (25, 8), (50, 60))], -1
    )
    content = encoded(Image.fromarray(waves.astype(np.uint8)), "JPEG", quality=95)
    whole, reduced = open_image(content), open_image(content, side=160)
    assert (whole.size, reduced.size) == ((1000, 700), (500, 350))
    off = fit_image(whole, 160, mode).astype(float) - fit_image(reduced, 160, mode)
    assert np.abs(off).mean() < 1
    # Never below twice what is wanted, and never where nothing is to be gained.
    assert open_image(content, side=176).size == (1000, 700)


def test_pixels_do_not_depend_on_what_else_is_made_of_an_image() -> None:
    content = encoded(noise(size=(1400, 1400)), "JPEG")
    sizes = {open_image(content, side).size for side in (32, 64, THUMBNAIL_SIDE)}
    assert sizes == {(350, 350)}


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


def undecoded(records: list[Record]) -> Pixels:
    """Pixels that are decoded when they are asked for."""
    unread = np.zeros(len(records), np.int64)
    return Pixels(records, side_8, None, 3, unread, unread)


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
    direct, _, _ = undecoded(good).fetch(rows)
    assert np.array_equal(images, direct)
    assert np.array_equal(direct, [side_8(jpeg(i)) for i in (5, 0, 3)])


def test_without_a_cache_fetch_drops_and_reports(records: list[Record]) -> None:
    images, places, lost = undecoded(records).fetch(np.array([4, 3, 1, 0]))
    assert places == [1, 3]
    assert np.array_equal(images, [side_8(jpeg(3)), side_8(jpeg(0))])
    assert [s.id for s in lost] == ["f/4.jpg", "f/1.jpg"]
    assert all(s.reason.startswith("not an image") for s in lost)
    with pytest.raises(DataError, match="none of 2 images can be decoded: not an image"):
        undecoded(records).fetch(np.array([4, 1]))


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
