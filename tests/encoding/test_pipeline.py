"""Overlapped encoding: order kept, losses named, texts once, memory bounded."""

import re
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import jpeg, write_pairs
from PIL import Image

from mmalign import files
from mmalign.data import Record, Skip, decode_on, fit_image, in_threads, open_image, scan
from mmalign.data.spilled import SpilledRecords, UniqueIds
from mmalign.embedding.embed import embed
from mmalign.encoding.batches import BatchSplitter, TextCache
from mmalign.encoding.modalities import encoder_of
from mmalign.encoding.pipeline import Pipeline
from mmalign.errors import DataError
from mmalign.model import Encoder, new_model


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    return new_model("nano", ["a dog", "two cats"])


def test_results_come_in_order_with_every_loss(encoder: Encoder, tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "p", 50)
    for bad in (3, 17, 49):
        (folder / f"{bad:03d}.jpg").write_bytes(jpeg(bad)[:200])
    records = scan([str(folder)]).records
    threads = torch.get_num_threads()
    done, lost = [], []
    pipeline = Pipeline(encoder, thumbnails=True)
    for good, skips in pipeline.run(records):
        done += good
        lost += skips
    assert torch.get_num_threads() == threads
    assert [e.record.id for e in done] == [r.id for r in records if r.id[2:5] not in bad_keys()]
    assert [s.id for s in lost] == ["p/003.jpg", "p/017.jpg", "p/049.jpg"]
    assert all("damaged" in s.reason for s in lost)
    for encoded in done[::7]:
        (pixels_SS3,) = encoded.item.decoded.parts
        alone = encoder.encode_images(pixels_SS3[None])
        assert np.allclose(encoded.vectors["image"], alone, atol=1e-5)
        texts = encoder.encode_texts(encoded.record.captions)
        assert np.allclose(encoded.vectors["text"], texts, atol=1e-5)
        assert encoded.item.decoded.thumbnail[:4] == b"RIFF"
    assert pipeline.describe().startswith("busy: ")


def test_what_a_camera_wrote_is_in_meta_under_what_stands_beside_the_image(
    encoder: Encoder, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0110], exif[0x0132] = "Box 2", "2020:01:31 12:00:05"
    folder = write_pairs(tmp_path / "p", 2)
    for i in range(2):
        Image.open(folder / f"00{i}.jpg").save(folder / f"00{i}.jpg", exif=exif)
    (folder / "001.json").write_text('{"taken": "long ago", "price": 7}')
    ((good, _),) = Pipeline(encoder, thumbnails=False).run(scan([str(folder)]).records)
    assert [e.record.meta for e in good] == [
        {"captions_zh": ["图片0"], "taken": "2020-01-31 12:00:05", "camera": "Box 2"},
        {"taken": "long ago", "camera": "Box 2", "price": 7},
    ]


def test_batches_shrink_at_an_end_that_is_known(encoder: Encoder, tmp_path: Path) -> None:
    """An encoder would else wait for the last whole batch of another."""
    records = scan([str(write_pairs(tmp_path / "p", 90))]).records

    def sizes(records: Iterable[Record]) -> list[int]:
        pipeline = Pipeline(encoder, thumbnails=False)
        pipeline.encoding.workers = 2
        return [len(good) for good, _ in pipeline.run(records)]

    assert sizes(records) == [16, 16, 14, 11, 8, 6, 4, 4, 4, 4, 3]
    assert sizes(iter(records[:10])) == [10]
    assert sizes(record for record in records) == [16, 16, 16, 16, 16, 10]


def test_jpegs_may_be_decoded_where_they_are_encoded(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of a GPU, walked on the CPU; what is no plain JPEG goes the other."""
    folder = tmp_path / "p"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02d}.jpg").write_bytes(jpeg(i, (200 + 9 * i, 300 - 5 * i)))
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open(folder / "03.jpg").save(folder / "03.jpg", exif=turned)
    Image.open(folder / "04.jpg").convert("CMYK").save(folder / "04.jpg")
    Image.open(folder / "05.jpg").save(folder / "05.png")
    whole = (folder / "06.jpg").read_bytes()
    (folder / "06.jpg").write_bytes(whole[: len(whole) // 2])
    records = scan([str(folder)]).records
    results = []
    for device in (False, True):
        pipeline = Pipeline(encoder, thumbnails=device)
        monkeypatch.setattr(encoder_of(encoder, "image"), "on_device", device)
        done = [e for good, _ in pipeline.run(records) for e in good]
        results.append({e.record.id: e for e in done})
    plain, on_device = results
    assert plain.keys() == on_device.keys()
    assert "p/06.jpg" not in plain
    waited = {name for name, e in on_device.items() if isinstance(e.item.decoded.parts[0], bytes)}
    assert waited == set(on_device) - {"p/03.jpg", "p/04.jpg", "p/05.png"}
    for name in plain:
        (one_D,), (other_D,) = (e[name].vectors["image"] for e in results)
        assert one_D @ other_D > 0.999


def test_a_device_that_cannot_decode_leaves_it_to_the_cpu(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*words: object) -> torch.Tensor:
        raise RuntimeError("nvjpeg: not supported")

    monkeypatch.setattr("mmalign.encoding.images.decode_on", refuse)
    monkeypatch.setattr(encoder_of(encoder, "image"), "on_device", True)
    records = scan([str(write_pairs(tmp_path / "p", 5))]).records
    pipeline = Pipeline(encoder, thumbnails=False)
    done = [e for good, _ in pipeline.run(records) for e in good]
    assert len(done) == 5
    assert all(isinstance(e.item.decoded.parts[0], bytes) for e in done)


@pytest.mark.parametrize("mode", ["squash", "shortest", "longest"])
def test_a_device_fits_images_as_the_cpu_does(mode: str) -> None:
    content = jpeg(3, (130, 90))
    ours = fit_image(open_image(content), 48, mode).astype(np.float32)
    theirs = decode_on(torch.device("cpu"), [content], 48, mode, "bicubic")[0].permute(1, 2, 0)
    assert np.abs(ours - theirs.numpy()).max() <= 2


def bad_keys() -> set[str]:
    return {"003", "017", "049"}


def test_a_batch_without_a_good_image_is_only_losses(encoder: Encoder) -> None:
    records = [Record(f"x/{i}", f"/no/{i}.jpg", f"/no/{i}.jpg") for i in range(40)]
    results = list(Pipeline(encoder, thumbnails=False).run(records))
    assert sum(len(good) for good, _ in results) == 0
    assert sum(len(lost) for _, lost in results) == 40


def test_equal_captions_are_encoded_once(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    assert encoder.dim  # known from now on; it takes encoding a text
    encode = encoder.encode_texts
    monkeypatch.setattr(encoder, "encode_texts", lambda t: (asked.extend(t), encode(t))[1])
    texts = TextCache(encoder)
    first = texts([["a dog", "a cat"], [], ["a dog"]])
    again = texts([["a cat"]])
    assert asked == ["a dog", "a cat"]
    assert [v.shape for v in first] == [(2, encoder.dim), (0, encoder.dim), (1, encoder.dim)]
    assert np.array_equal(first[0][1], again[0][0])


def test_old_captions_are_forgotten(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmalign.encoding.batches.CACHED_TEXTS", 3)
    texts = TextCache(encoder)
    for word in "abcde":
        texts([[word]])
    assert list(texts._known) == ["c", "d", "e"]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
     RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")],
)  # fmt: skip
def test_out_of_memory_halves_the_batch(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes: list[int] = []

    def encode(items: list[int]) -> np.ndarray:
        sizes.append(len(items))
        if len(items) > 3:
            raise error
        return np.array(items, np.float32)[:, None]

    halving = BatchSplitter(encode)
    assert halving(list(range(9)))[:, 0].tolist() == list(range(9))
    assert sizes == [9, 4, 2, 2, 2, 2, 1]
    assert (
        "out of memory with a batch of 9; continuing with batches of 4" in capsys.readouterr().err
    )
    # What was too much once is not tried again.
    sizes.clear()
    assert halving(list(range(5)))[:, 0].tolist() == list(range(5))
    assert sizes == [2, 2, 1]
    assert capsys.readouterr().err == ""


def test_other_errors_and_a_single_item_are_not_tried_again() -> None:
    def fails(items: object) -> np.ndarray:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        BatchSplitter(fails)([1, 2])

    def full(items: object) -> np.ndarray:
        raise MemoryError

    with pytest.raises(MemoryError):
        BatchSplitter(full)([1])


def test_an_error_of_the_encoder_surfaces(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = scan([str(write_pairs(tmp_path / "p", 40))]).records
    pipeline = Pipeline(encoder, thumbnails=False)

    def fail(batch: object) -> np.ndarray:
        raise ValueError("no such layer")

    monkeypatch.setattr(encoder, "text_vectors", fail)
    before = threading.active_count()
    with pytest.raises(ValueError, match="no such layer"):
        list(pipeline.run(records))
    assert threading.active_count() <= before


def test_threads_take_a_stream_as_it_is_asked_for() -> None:
    taken: list[int] = []

    def items():  # type: ignore[no-untyped-def]
        for i in range(100):
            taken.append(i)
            yield i

    def halve(i: int) -> float:
        return i / 2

    stream = in_threads(halve, items(), 3, ahead=5)
    assert [next(stream) for _ in range(4)] == [0, 0.5, 1, 1.5]
    assert len(taken) <= 5 + 4
    stream.close()  # type: ignore[attr-defined]

    def fail_at_two(i: int) -> int:
        if i == 2:
            raise KeyError(i)
        return i

    got: list[int] = []
    with pytest.raises(KeyError):
        got.extend(in_threads(fail_at_two, range(9), 2, ahead=4))


def record(number: int, uri: str = "") -> Record:
    return Record(f"s/{number}", uri or f"/s/{number}.jpg", "/s", captions=("ein Hund",))


def test_a_spool_gives_back_what_it_took() -> None:
    spilled = SpilledRecords()
    for i in range(1000):
        spilled.add(record(i))
    assert len(spilled) == 1000
    assert list(spilled) == [record(i) for i in range(1000)]
    # A part of it may be looked at first.
    assert next(iter(spilled)) == record(0)
    assert [r.id for r in spilled] == [f"s/{i}" for i in range(1000)]
    spilled.close()


def test_names_are_forgotten_when_a_scan_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[UniqueIds] = []
    close = UniqueIds.close

    def note(names: UniqueIds) -> None:
        closed.append(names)
        close(names)

    monkeypatch.setattr(UniqueIds, "close", note)
    with pytest.raises(DataError, match="no such file"):
        scan([str(write_pairs(tmp_path / "p", 2)), str(tmp_path / "gone")])
    assert len(closed) == 1


@pytest.mark.parametrize(
    ("seen", "wanted"),
    [
        ([record(1), record(1)], "given twice"),
        ([record(1), record(1, "/t/1.jpg")], "/t/1.jpg"),
        ([record(1), record(1, "/t/1.jpg"), record(1, "/t/1.jpg")], "given twice"),
        ([record(1), record(2)], "s/2"),
    ],
)
def test_names_are_made_unique(seen: list[Record], wanted: str) -> None:
    names = UniqueIds()
    found: list[Record | Skip] = [names.with_unique_id(r) for r in seen]
    last = found[-1]
    assert (last.reason if isinstance(last, Skip) else last.id) == wanted
    names.close()


def test_what_embed_and_index_put_aside_lies_in_the_folder_of_the_store(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/tmp is memory on many systems. Named by who asks: the samples, images of a table, codes."""
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    asked: dict[str, Path] = {}
    scratch_file = files.scratch_file

    def seen() -> object:
        caller = sys._getframe(1).f_globals["__name__"]
        asked[caller] = files.scratch_folder()
        return scratch_file()

    monkeypatch.setattr(files, "scratch_file", seen)
    table = pa.table({"image": [jpeg(n) for n in range(4)], "caption": list("abcd")})
    pq.write_table(table, tmp_path / "images.parquet")
    place = tmp_path / "out" / "a.store"
    place.parent.mkdir()
    embed(run, [str(tmp_path / "images.parquet")], place)
    assert set(asked) == {"mmalign.data.spilled", "mmalign.data.row_images"}
    assert asked["mmalign.data.spilled"] == place.parent
    assert asked["mmalign.data.row_images"] in (place.parent, place)
    assert not any(p.suffix == ".tmp" for p in tmp_path.rglob("*"))


def test_no_other_temporary_files_are_made() -> None:
    """SQLite has one of its own, in the first of $SQLITE_TMPDIR, $TMPDIR, /var/tmp."""
    found = {
        file.name
        for folder in ("mmalign", "index")
        for file in (Path(__file__).parents[2] / folder).rglob("*.py")
        if re.search(r"TemporaryFile\(|mkstemp|mkdtemp", file.read_text(encoding="utf-8"))
    }
    assert found == {"files.py"}
