"""Sources in, records out, and a reason for everything that is left out."""

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_tar
from data_samples import (
    captions,
    encoded,
    huge_png,
    jpeg,
    listed,
    noise,
    reasons,
    side_8,
    write_folder,
)

from mmalign.data import Catalog, Skip, decode_stream, read_image, report_skips, scan
from mmalign.data.samples import Affected
from mmalign.errors import DataError


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
    (passed_over,) = catalog.skips
    assert (passed_over.reason, passed_over.affects) == (
        "not an image by its extension: .md",
        "extension",
    )
    deepest = catalog.records[-1]
    assert deepest.uri == str(photos / "deep/er/b.PNG")
    assert deepest.meta == {"zh": "图", "year": 1999}
    assert read_image(deepest) == (photos / "deep/er/b.PNG").read_bytes()


def test_caption_keys_pick_and_join(photos: Path) -> None:
    other = listed(photos, caption_keys=("zh",), need_captions=True)
    assert captions(other) == {"photos/deep/er/b.PNG": ("图",)}
    assert {s.reason for s in other.skips if s.affects == "sample"} == {"no caption"}
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
    assert [s.sample_is_used for s in catalog.skips] == [True]


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
        tmp_path / "f", {"a.jpg": jpeg(), "b.jxl": b"x", "c.txt": "alone", "d.svg": "<svg/>"}
    )
    assert reasons(listed(folder).skips) == {
        "f/b.jxl": "image type not supported: .jxl",
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
    assert "tar ends in the middle of this file" in why
    assert any(reason.startswith("tar cannot be read to its end") for reason in why)


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100])
def test_what_is_no_tar_is_said_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"s\.tar: cannot be read as a tar"):
        listed(tmp_path / "s.tar")


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


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("foo://bucket/x.tar", "cannot be opened: Protocol not known: foo"),
        ("memory://none/*.tar", "no such file or folder$"),
        ("memory://none.tar", "no such file"),
        ("memory://none", "no such folder"),
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
    with pytest.raises(DataError, match=r"one\.jpg: not a source: it is an image: give the folder"):
        listed(tmp_path / "one.jpg")
    with pytest.raises(DataError, match=r"photos/a\.txt: caption without an image"):
        listed(tmp_path / "photos")


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
    assert not any(s.sample_is_used for s in catalog.skips)


def test_without_captions_wanted_their_images_stay(tmp_path: Path) -> None:
    catalog, why, decoded = losses(corrupt_set(tmp_path), need_captions=False)
    assert decoded == 12 + 2 + 2
    assert why["set/empty.jpg"] == "caption file is empty"
    assert [s.id for s in catalog.skips if s.sample_is_used] == ["set/empty.jpg", "set/latin.jpg"]
    (twice,) = [r for r in catalog.records if r.id == "dup/twice"]
    assert read_image(twice) == jpeg(31)


def skips_of(count: int, affects: Affected = "sample") -> list[Skip]:
    return [
        Skip(f"s/{i}", f"/s/{i}", f"not an image: starts with {i}", affects) for i in range(count)
    ]


def test_more_than_one_percent_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    report_skips(skips_of(1), found=100, used=99, where="skipped.jsonl")
    quiet = capsys.readouterr()
    report_skips(skips_of(2), found=100, used=98, where="skipped.jsonl")
    loud = capsys.readouterr()
    assert quiet.err.startswith("1 of 100 samples skipped (1 not an image); listed in skipped.")
    assert loud.err.startswith("warning: 2 of 100 samples skipped (2 not an image)")
    assert quiet.out == loud.out == ""
    report_skips([], found=100, used=100)
    assert capsys.readouterr().err == ""


def test_captions_places_and_repeats_are_told_apart_from_samples(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report_skips(skips_of(5, affects="captions"), found=5, used=5)
    assert capsys.readouterr().err == "warning: captions of 5 samples not used (5 not an image)\n"
    skips = [
        *skips_of(3, affects="captions"),
        Skip("t", "/t.tar", "tar cannot be read to its end", "place"),
    ]
    report_skips(skips, found=900, used=900)
    told = (
        "captions of 3 samples not used (3 not an image); "
        "1 files or folders not read completely (1 tar cannot be read to its end)"
    )
    assert capsys.readouterr().err == f"warning: {told}\n"
    report_skips(skips_of(2, affects="nothing"), found=7, used=7)
    assert capsys.readouterr().err == "2 samples given twice, used once\n"


@pytest.mark.parametrize(("found", "used"), [(10, 10), (10, 7)])
def test_a_sample_that_is_counted_twice_or_never_is_a_bug(found: int, used: int) -> None:
    with pytest.raises(AssertionError, match=f"10 samples were found, and became {used} used, 2 f"):
        report_skips(skips_of(2), found=found, used=used)


def test_all_skipped_is_an_error_with_an_example() -> None:
    with pytest.raises(DataError, match="none of the 3 samples .*3 not an image; .*/s/0: not an"):
        report_skips(skips_of(3), found=3, used=0)
    report_skips(skips_of(3, affects="captions"), found=3, used=3)
