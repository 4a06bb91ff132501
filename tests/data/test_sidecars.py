"""What stands beside an image: captions, metadata of other programs, files that are no images."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_tar
from data_samples import captions, encoded, jpeg, listed, noise, reasons, write_folder

from mmalign.data import Catalog, is_image_content, read_image

XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Rating="4" xmp:CreateDate="2020-02-03T04:05:06">
<dc:title><rdf:Alt><rdf:li xml:lang="x-default">Harbour</rdf:li></rdf:Alt></dc:title>
<dc:description><rdf:Alt><rdf:li xml:lang="en">boats at dawn</rdf:li>
<rdf:li xml:lang="zh">黎明的船</rdf:li></rdf:Alt></dc:description>
<dc:subject><rdf:Bag><rdf:li>boat</rdf:li><rdf:li>sea</rdf:li></rdf:Bag></dc:subject>
</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>"""
TAKEOUT = json.dumps(
    {
        "title": "a.jpg",
        "description": "at the lake",
        "photoTakenTime": {"timestamp": "1577934245", "formatted": "Jan 2, 2020"},
        "geoData": {"latitude": 47.5, "longitude": 8.25, "altitude": 400.0},
        "people": [{"name": "A"}],
    }
)
TAKEN = {
    "taken": "2020-01-02 03:04:05+00:00",
    "latitude": 47.5,
    "longitude": 8.25,
    "altitude": 400.0,
    "people": ["A"],
}


def both(tmp_path: Path, members: dict[str, bytes | str], **options: Any) -> list[Catalog]:
    """Scan files as a folder, and as a tar."""
    folder = write_folder(tmp_path / "s", members)
    as_bytes = [(n, c.encode() if isinstance(c, str) else c) for n, c in members.items()]
    return [listed(folder, **options), listed(write_tar(tmp_path / "s.tar", as_bytes), **options)]


@pytest.mark.parametrize(
    ("sidecar", "content", "words", "meta"),
    [
        ("a.txt", "one\ntwo\n", ("one", "two"), {}),
        ("a.CAPTION", "one", ("one",), {}),
        ("a.jpg.txt", "one", ("one",), {}),
        ("a.jpg.caption", "one", ("one",), {}),
        ("a.JSON", '{"caption": "one", "price": 7}', ("one",), {"price": 7}),
        ("a.jpg.json", '{"caption": "one", "price": NaN}', ("one",), {"price": None}),
        ("a.jpg.json", TAKEOUT, ("at the lake",), TAKEN),
        ("a.jpg.supplemental-metadata.json", TAKEOUT, ("at the lake",), TAKEN),
        (
            "a.xmp",
            XMP,
            ("boats at dawn", "黎明的船"),
            {
                "title": "Harbour",
                "subject": ["boat", "sea"],
                "taken": "2020-02-03 04:05:06",
                "rating": 4,
            },
        ),
        ("a.jpg.XMP", XMP.encode("utf-16"), ("boats at dawn", "黎明的船"), None),
    ],
)
def test_sidecars_are_read_in_folders_and_tars(
    tmp_path: Path, sidecar: str, content: str | bytes, words: tuple[str, ...], meta: Any
) -> None:
    for catalog in both(tmp_path, {"a.jpg": jpeg(), sidecar: content}):
        (record,) = catalog.records
        assert record.captions == words
        assert meta is None or record.meta == meta
        assert catalog.skips == []


@pytest.mark.parametrize(
    ("image", "sidecar"),
    [
        ("IMG(1).jpg", "IMG.jpg(1).json"),
        ("IMG(1).jpg", "IMG.jpg.supplemental-metadata(1).json"),
        ("x" * 40 + ".jpg", "x" * 40 + ".jpg.s.json"),
        ("y" * 50 + ".jpg", "y" * 46 + ".json"),
    ],
)
def test_names_that_takeout_cuts_and_numbers(tmp_path: Path, image: str, sidecar: str) -> None:
    for catalog in both(tmp_path, {image: jpeg(), sidecar: TAKEOUT}):
        assert [r.captions for r in catalog.records] == [("at the lake",)]
        assert catalog.skips == []


def test_our_own_json_wins_then_text_then_other_programs(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {
        "a.jpg": jpeg(), "a.json": '{"caption": "own", "rating": 1}', "a.txt": "text",
        "a.jpg.json": TAKEOUT, "a.xmp": XMP,
        "b.jpg": jpeg(1), "b.txt": "text", "b.xmp": XMP,
    }  # fmt: skip
    for catalog in both(tmp_path, members):
        first, second = catalog.records
        assert (first.captions, second.captions) == (("own",), ("text",))
        assert first.meta["rating"] == 1
        assert first.meta["taken"] == TAKEN["taken"]
        # What did not become a caption is not lost.
        assert first.meta["description"] == "at the lake"
        assert second.meta["description"] == ["boats at dawn", "黎明的船"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("<a", ".xmp is not valid: unclosed token"),
        (b"\xff\xfea", ".xmp is not valid: "),
        ('<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', ".xmp is not supported: it declares"),
    ],
)
def test_xmp_that_is_damaged_or_grows_is_refused(
    tmp_path: Path, content: str | bytes, reason: str
) -> None:
    for catalog in both(tmp_path, {"a.jpg": jpeg(), "a.xmp": content, "a.txt": "one"}):
        (record,), (skip,) = catalog.records, catalog.skips
        assert record.captions == ("one",)
        assert skip.sample_is_used
        assert skip.reason.startswith(reason)


@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv"])
def test_a_metadata_table_beside_images_is_used(tmp_path: Path, table: str) -> None:
    rows = [("a.jpg", "one", 3), ("deep/b.jpg", "two", 4), ("gone.jpg", "three", 5)]
    as_json = [json.dumps({"file_name": n, "text": t, "price": p}) for n, t, p in rows]
    as_csv = ["file_name,text,price", *(f"{n},{t},{p}" for n, t, p in rows)]
    lines = as_json if table.endswith("jsonl") else as_csv
    folder = write_folder(
        tmp_path / "f",
        {
            "train/a.jpg": jpeg(), "train/deep/b.jpg": jpeg(1), "train/deep/b.txt": "own",
            "train/c.jpg": jpeg(2), f"train/{table}": "\n".join(lines) + "\n",
        },
    )  # fmt: skip
    catalog = listed(folder)
    assert captions(catalog) == {
        "f/train/a.jpg": ("one",),
        "f/train/c.jpg": (),
        "f/train/deep/b.jpg": ("own",),
    }
    assert [str(r.meta.get("price")) for r in catalog.records] == ["3", "None", "4"]
    (skip,) = catalog.skips
    assert skip.uri == str(folder / "train/gone.jpg")
    assert skip.reason == "listed in a table beside the images, but missing"


def test_a_metadata_table_without_images_costs_captions_only(tmp_path: Path) -> None:
    catalog = listed(write_folder(tmp_path / "f", {"a.jpg": jpeg(), "metadata.csv": "x,y\n1,2\n"}))
    (skip,) = catalog.skips
    assert (len(catalog.records), skip.affects) == (1, "captions")
    assert "no image column" in skip.reason


def test_a_caption_of_another_name_is_named_and_can_be_asked_for(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {
        "k.input.jpg": jpeg(), "k.outputs.txt": "one\ntwo", "k.json": '{"price": 3}'
    }  # fmt: skip
    write_tar(
        tmp_path / "s.tar",
        [(n, c if isinstance(c, bytes) else c.encode()) for n, c in members.items()],
    )
    plain = listed(tmp_path / "s.tar")
    assert captions(plain) == {"s/k.input": ()}
    assert reasons(plain.skips) == {
        "s/k.outputs": "caption file of another key: add --caption-key outputs.txt"
    }
    asked = listed(tmp_path / "s.tar", caption_keys=("captions", "outputs.txt"))
    assert captions(asked) == {"s/k.input": ("one", "two")}
    assert asked.skips == []
    assert asked.records[0].meta == {"price": 3}
    folder = write_folder(tmp_path / "f", members)
    assert captions(listed(folder, caption_keys=("outputs.txt",)))["f/k.input.jpg"] == (
        "one",
        "two",
    )


def test_files_are_taken_by_ending_then_by_content_and_nothing_is_silent(tmp_path: Path) -> None:
    members: dict[str, bytes | str] = {
        "a.JFIF": jpeg(), "b": jpeg(1), "c.pic": encoded(noise(2)),
        "d.1": encoded(noise(3), "WEBP"),
        "film.mp4": b"\0\0\0\x18ftypisom", "film2.MP4": b"x", "notes.md": "x", "words": "x",
        "old.tar": b"x", "data.xyz": b"\0", "empty": b"", "draw": "<svg/>", "stray.json": "{}",
    }  # fmt: skip
    for catalog in both(tmp_path, members):
        assert [len(read_image(r)) for r in catalog.records] == [
            len(members[n]) for n in ("a.JFIF", "b", "c.pic", "d.1")
        ]
        counted = {s.reason: s.count for s in catalog.skips if s.affects == "extension"}
        assert counted == {
            "not an image by its extension: .mp4": 2,
            "not an image by its extension: .md": 1,
            "not an image by its extension: .json": 1,
            "not an image by its content: no extension": 2,
            "not an image by its content: .xyz": 1,
            "a source, not an image: .tar": 1,
        }
        assert [s.reason for s in catalog.skips if s.affects == "sample"] == [
            "image type not supported: .svg"
        ]


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "ICO", "AVIF", "DDS"]
)
def test_images_are_known_by_their_content(kind: str) -> None:
    assert is_image_content(encoded(noise(), kind))


@pytest.mark.parametrize(
    "content",
    [
        b"", b"a dog on a beach", b"P1 is a parking lot", b"BMW", b"RIFF....WAVE", b"\0\0\1\0",
        b"\0\0\0\x18ftypisom\0\0\0\0isommp42", b"%PDF-1.7", "图片".encode(), b"{}",
    ],
)  # fmt: skip
def test_other_content_is_no_image(content: bytes) -> None:
    assert not is_image_content(content)
