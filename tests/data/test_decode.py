"""Formats that people have, decoded within one budget of memory, as a viewer shows them."""

import io
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from data_samples import encoded, huge_png, jpeg, noise
from PIL import Image, ImageCms

from mmalign.data import decode, image_meta, is_image_content, open_image, suits_device
from mmalign.data.budget import ByteBudget, decoding_budget, memory_bytes
from mmalign.data.samples import SampleProblem
from mmalign.errors import DataError


def test_threads_share_one_budget_and_none_waits_for_ever() -> None:
    budget = ByteBudget(100, 60)
    held = [0]
    most: list[int] = []
    lock = threading.Lock()

    def work(number: int) -> None:
        wanted = (60, 30, 1, 45)[number % 4]
        with budget.reserved(wanted, "it"):
            with lock:
                held[0] += wanted
                most.append(held[0])
            time.sleep(0.001)
            with lock:
                held[0] -= wanted

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(64)))
    assert len(most) == 64
    assert 60 < max(most) <= 100
    with budget.reserved(60, "it"):
        pass


def test_what_fails_gives_back_what_it_took() -> None:
    budget = ByteBudget(10, 10)
    for _ in range(3):
        with suppress(KeyError), budget.reserved(10, "it"):
            raise KeyError
    with pytest.raises(SampleProblem, match=r"too large to decode: it needs 0\.0 GB"):
        budget.reserved(11, "it").__enter__()
    with budget.reserved(10, "it"):
        pass


def test_the_budget_fits_the_machine() -> None:
    budget = decoding_budget()
    assert budget.each_bytes <= budget.total_bytes <= memory_bytes() / 4


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], ByteBudget]:
    """Give decoding a budget of some bytes."""

    def give(total: int) -> ByteBudget:
        budget = ByteBudget(total, total)
        monkeypatch.setattr(decode, "decoding_budget", lambda: budget)
        return budget

    return give


@pytest.mark.slow
def test_images_in_many_threads_stay_within_the_budget(
    narrow: Callable[[int], ByteBudget], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = encoded(Image.new("RGBA", (1200, 1200), (1, 2, 3, 128)))
    narrow(2 * 45_000_000)
    together: list[int] = []
    at_once = [0]
    to_rgb = decode._to_rgb

    def watched(image: Image.Image, factor: int) -> Image.Image:
        at_once[0] += 1
        together.append(at_once[0])
        time.sleep(0.01)
        found = to_rgb(image, factor)
        at_once[0] -= 1
        return found

    monkeypatch.setattr(decode, "_to_rgb", watched)
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(lambda c: open_image(c).size, [content] * 16))
    assert sizes == [(1200, 1200)] * 16
    assert max(together) <= 2


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "AVIF", "JPEG2000", "TIFF", "GIF"])
def test_an_image_larger_than_the_budget_is_refused_by_name_before_it_is_decoded(
    narrow: Callable[[int], ByteBudget], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode = "P" if kind == "GIF" else "RGB"
    open_image(encoded(Image.new("RGB", (8, 8)).convert(mode), kind))  # fills Pillow's caches
    narrow(30_000_000)
    content = encoded(Image.new("RGB", (1500, 1500)).convert(mode), kind)
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(DataError, match=rf"too large to decode: 1500 x 1500 {kind} \(.*0\.0 GB"):
        open_image(content)


def test_a_small_icon_with_a_large_png_inside_is_refused(
    narrow: Callable[[int], ByteBudget],
) -> None:
    inside = encoded(Image.new("RGBA", (2000, 2000)))
    sizes = [struct.pack(">I", len(inside) + more) for more in (16, 8)]
    narrow(30_000_000)
    with pytest.raises(DataError, match=r"too large to decode: 128 x 128 ICNS"):
        open_image(b"icns" + sizes[0] + b"ic07" + sizes[1] + inside)


def test_large_images_are_reduced_and_equal_the_whole_on_the_average(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decode, "REDUCED_ABOVE", 1 << 16)
    monkeypatch.setattr(decode, "STRIP_PIXELS", 10_000)
    ramp = np.add.outer(np.arange(1400), np.arange(1300)) // 11
    image = Image.fromarray(ramp.astype(np.uint8)).convert("RGBA")
    image.putalpha(200)
    whole, reduced = open_image(encoded(image)), open_image(encoded(image), side=160)
    assert reduced.size == (650, 700)
    assert np.array_equal(np.asarray(whole.reduce(2)), np.asarray(reduced))


def test_colours_are_converted_by_strips_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in ("RGBA", "P", "L", "I;16", "CMYK"):
        image = noise(size=(90, 70))
        grey = np.asarray(image)[..., 0].astype(np.uint16) * 200
        image = Image.fromarray(grey) if mode == "I;16" else image.convert(mode)
        content = encoded(image, "TIFF")
        at_once = np.asarray(open_image(content))
        with monkeypatch.context() as patch:
            patch.setattr(decode, "STRIP_PIXELS", 900)
            assert np.array_equal(np.asarray(open_image(content)), at_once), mode


@pytest.mark.parametrize("pixels", [huge_png])
def test_pillow_does_not_warn_of_large_images(pixels: Callable[[], bytes]) -> None:
    # Warnings are errors in these tests; Pillow's limit is one number for the whole process.
    with pytest.raises(DataError, match="too many pixels: 20000 x 20000"):
        open_image(pixels())
    assert Image.MAX_IMAGE_PIXELS == 89_478_485


KINDS = ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO", "TGA",
         "MPO", "QOI", "DDS", "PCX", "ICNS", "SGI"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_images(kind: str) -> None:
    side = 64 if kind in ("ICO", "ICNS") else 40
    image = Image.new("RGB", (side, side), (200, 40, 90))
    content = encoded(image.quantize(8) if kind == "GIF" else image, kind)
    off = np.abs(np.asarray(open_image(content)).astype(int) - (200, 40, 90))
    assert off.max() < 25


def test_a_sun_raster_is_decoded() -> None:
    header = struct.pack(">8I", 0x59A66A95, 2, 1, 24, 6, 1, 0, 0)
    content = header + bytes((90, 40, 200)) * 2
    assert is_image_content(content)
    assert np.asarray(open_image(content)).tolist() == [[[200, 40, 90]] * 2]


def test_an_empty_file_is_said_to_be_empty() -> None:
    with pytest.raises(DataError, match="not an image: the file is empty"):
        open_image(b"")


def test_postscript_is_not_handed_to_another_program() -> None:
    with pytest.raises(DataError, match="not an image: starts with"):
        open_image(encoded(noise(), "EPS"))


def heic(**options: Any) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    out = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (60, 40), (200, 40, 90))).save(out, **options)
    return out.getvalue()


def test_heic_is_decoded() -> None:
    image = open_image(heic())
    assert image.size == (60, 40)
    assert np.abs(np.asarray(image).astype(int) - (200, 40, 90)).max() < 25
    # Nobody else's Pillow changes by that.
    assert "HEIF" not in Image.OPEN


def test_without_the_extra_heic_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmalign.data.kinds.has_heif", lambda: False)
    content = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    with pytest.raises(
        DataError, match=r"HEIC needs an extra package: pip install 'mmalign\[photos\]'"
    ):
        open_image(content)


def exif_of(orientation: int = 1) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x0110] = orientation, "Canon\0", "Canon EOS 80D"
    exif.get_ifd(0x8769).update({0x9003: "2020:01:31 12:00:05", 0xA434: "EF 50mm"})
    exif.get_ifd(0x8825).update(
        {1: "S", 2: (33.0, 30.0, 0.0), 3: "E", 4: (151.0, 15.0, 36.0), 5: b"\1", 6: 12.5}
    )
    return exif


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_date_camera_and_place_come_from_exif(kind: str) -> None:
    assert image_meta(encoded(noise(), kind, exif=exif_of())) == {
        "taken": "2020-01-31 12:00:05",
        "camera": "Canon EOS 80D",
        "lens": "EF 50mm",
        "latitude": -33.5,
        "longitude": 151.26,
        "altitude": -12.5,
    }


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_exif_that_makes_no_sense_costs_nothing() -> None:
    exif = exif_of()
    exif.get_ifd(0x8769).update({0x9003: "0000:00:00 00:00:00"})
    exif.get_ifd(0x8825).update({2: (999.0, 0.0, 0.0), 6: 0})
    exif[0x010F], exif[0x0110] = "", ""
    assert image_meta(encoded(noise(), "JPEG", exif=exif)) == {"lens": "EF 50mm", "altitude": 0.0}
    broken = encoded(noise(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert image_meta(broken) == {}
    assert open_image(broken).size == (40, 30)
    assert image_meta(b"no image") == image_meta(jpeg()) == {}


def raw_like(preview: bytes, orientation: int) -> bytes:
    """Write a TIFF as DNG files are: a thumbnail first, and a JPEG among what follows."""
    thumb = Image.new("RGB", (16, 12))
    tags = {254: 1, 50706: b"\1\4\0\0", 0x0112: orientation, 271: "Maker", 272: "Model"}
    lossless = b"\xff\xd8\xff\xc3\0\x0b\x08\xff\xff\xff\xff\x01\x01\x11\0"
    return encoded(thumb, "TIFF", tiffinfo=tags) + lossless + preview + b"\0" * 99


def test_the_preview_of_a_raw_file_is_shown_upright() -> None:
    small = encoded(Image.new("RGB", (20, 10)), "JPEG")
    picture = Image.new("RGB", (120, 80), "blue")
    content = raw_like(small + encoded(picture, "JPEG"), orientation=6)
    image = open_image(content)
    assert image.size == (80, 120)
    assert np.asarray(image).reshape(-1, 3).mean(0).round().tolist() == pytest.approx(
        [0, 0, 254], abs=3
    )
    assert image_meta(content)["camera"] == "Maker Model"
    # A preview that says itself how it is turned is not turned twice.
    turned = encoded(picture, "JPEG", exif=exif_of(8))
    assert open_image(raw_like(turned, orientation=8)).size == (80, 120)


def test_raw_files_that_pillow_cannot_open_give_their_preview_or_are_named() -> None:
    fuji = b"FUJIFILMCCD-RAW 0201" + b"\0" * 60
    assert open_image(fuji + jpeg()).size == (40, 30)
    with pytest.raises(DataError, match="raw image without a readable preview"):
        open_image(fuji + b"\xff\xd8\xff" * 5000)


def profile_with_swapped_primaries() -> bytes:
    """Take sRGB and exchange red and green: colours that nobody could miss."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    at = {
        bytes(profile[i : i + 4]): profile[i + 7] + 256 * profile[i + 6]
        for i in range(132, 132 + 12 * profile[131], 12)
    }
    red, green = at[b"rXYZ"] + 8, at[b"gXYZ"] + 8
    profile[red : red + 12], profile[green : green + 12] = (
        profile[green : green + 12],
        profile[red : red + 12],
    )
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "abcd".encode("utf-16-be"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colour_profiles_are_applied(kind: str, mode: str) -> None:
    if (kind, mode) == ("JPEG", "RGBA"):
        mode = "RGB"
    image = Image.new(mode, (32, 32), "red")
    swapped = encoded(image, kind, icc_profile=profile_with_swapped_primaries())
    shown = np.asarray(open_image(swapped)).reshape(-1, 3).mean(0)
    assert shown == pytest.approx([0, 255, 0], abs=12)
    # sRGB, no profile, and what is no profile leave the pixels as they are.
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = np.asarray(open_image(encoded(image, kind)))
    for profile in (srgb, b"no profile"):
        assert np.array_equal(open_image(encoded(image, kind, icc_profile=profile)), plain)


def test_a_profile_of_another_space_than_the_image_is_ignored() -> None:
    grey = encoded(Image.new("L", (8, 8), 90), icc_profile=profile_with_swapped_primaries())
    assert np.unique(np.asarray(open_image(grey))).tolist() == [90]


def test_a_gpu_decodes_only_what_it_decodes_alike() -> None:
    swapped = encoded(noise(), "JPEG", icc_profile=profile_with_swapped_primaries())
    assert suits_device(jpeg())
    assert not suits_device(swapped)
    assert not suits_device(encoded(noise(), "JPEG", exif=exif_of(6)))
    assert not suits_device(encoded(noise(), "PNG"))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_12_bits_in_16_are_not_black(kind: str) -> None:
    ramp = np.linspace(0, 4095, 256).astype(np.uint16).reshape(16, 16)
    pixels = np.asarray(open_image(encoded(Image.fromarray(ramp), kind)))
    assert np.abs(pixels[..., 0].ravel().astype(int) - np.arange(256)).max() <= 1
