"""After any sequence of changes to its sources a store equals one that is embedded afresh.

Each step changes folders, a tar and tables at random, embeds, and compares the store with what the
sources hold now. MMALIGN_SEEDS=100 and MMALIGN_STEPS=50 try more.
"""

import hashlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import jpeg, write_tar
from PIL import Image
from stub_encoder import StubEncoder, use_stub, vector

from mmalign.data import Record, Stamps, fit_image, image_meta, open_image, read_image, scan
from mmalign.embedding.embed import EmbedReport, embed
from mmalign.embedding.stored import uri_prefixes
from mmalign.errors import DataError
from mmalign.store import meta_json, open_store

SEEDS = int(os.environ.get("MMALIGN_SEEDS", "4"))
STEPS = int(os.environ.get("MMALIGN_STEPS", "12"))
CONTENT = ("id", "uri", "captions", "meta", "stamp", "checksum")
Rows = dict[str, dict[str, Any]]


def picture(number: int, model: str = "") -> bytes:
    """A picture; with a camera's name in it, its pixels are the same."""
    content = jpeg(number, (12, 12))
    if not model:
        return content
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0110] = model
    Image.open(io.BytesIO(content)).save(out, "JPEG", exif=exif, quality="keep")
    return out.getvalue()


class World:
    """Sources that change."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.draw, self.made = root, random.Random(seed), 0
        self.folder = root / "f"
        (self.folder / "sub").mkdir(parents=True)
        self.gone: list[tuple[str, bytes]] = []
        self.clock = 1_000_000_000
        self.members: list[tuple[str, bytes]] = []
        self.tables: dict[str, list[dict[str, Any]]] = {"ids": [], "bare": []}
        self.torn, self.locked = False, False
        for _ in range(4):
            self.add()
            self.change_tar()
            self.change_table()

    # ------------------------------------------------------------ what is there

    def sources(self) -> list[str]:
        tables = [str(self.root / f"{name}.parquet") for name in self.tables]
        return [str(self.folder), str(self.root / "t.tar"), *tables]

    def files(self) -> list[Path]:
        return sorted(self.folder.rglob("*.jpg"))

    def new(self) -> bytes:
        self.made += 1
        camera = f"camera {self.made}" if self.draw.random() < 0.2 else ""
        return picture(self.made, camera)

    def some(self) -> bytes:
        """A new picture, one that is there, or one that was there."""
        # Of a table, a row that cannot be used keeps the number that it had: no place to compare.
        there = [f.read_bytes() for f in self.files()] + [content for _, content in self.gone]
        kept = [content for content in there if not content.startswith(b"broken")]
        return self.draw.choice(kept) if kept and self.draw.random() < 0.4 else self.new()

    def put(self, file: Path, content: bytes) -> None:
        """Write a file at a time of its own: clocks of file systems are coarse."""
        file.write_bytes(content)
        self.tick(file)

    def tick(self, file: Path) -> None:
        self.clock += 1
        os.utime(file, (self.clock, self.clock))

    # ------------------------------------------------------------ changes of the folder

    def add(self) -> None:
        folder = self.draw.choice([self.folder, self.folder / "sub"])
        file = folder / f"n{self.made}.jpg"
        self.put(file, self.some())
        if self.draw.random() < 0.7:
            file.with_suffix(".txt").write_text(f"words {self.draw.randrange(4)}")

    def delete(self) -> None:
        if len(self.files()) > 1:
            file = self.draw.choice(self.files())
            self.gone.append((file.name, file.read_bytes()))
            file.unlink()
            file.with_suffix(".txt").unlink(missing_ok=True)

    def come_back(self) -> None:
        if self.gone:
            name, content = self.draw.choice(self.gone)
            self.put(self.folder / name, content)

    def rename(self) -> None:
        file = self.draw.choice(self.files())
        self.made += 1
        folder = self.draw.choice([self.folder, self.folder / "sub"])
        target = folder / f"r{self.made}.jpg"
        file.rename(target)
        words = file.with_suffix(".txt")
        if words.exists() and self.draw.random() < 0.7:
            words.rename(target.with_suffix(".txt"))

    def swap(self) -> None:
        one, other = self.draw.choice(self.files()), self.draw.choice(self.files())
        contents = one.read_bytes(), other.read_bytes()
        self.put(one, contents[1])
        self.put(other, contents[0])

    def touch(self) -> None:
        for file in self.files():
            self.tick(file)

    def move_folder(self) -> None:
        self.made += 1
        name = self.draw.choice(["f", "photos"])
        target = self.root / f"place{self.made}" / name
        target.parent.mkdir()
        self.folder = self.folder.rename(target)

    def edit_image(self) -> None:
        file = self.draw.choice(self.files())
        if not file.read_bytes().startswith(b"broken"):
            self.made += 1
            out, exif = io.BytesIO(), Image.Exif()
            exif[0x0110] = f"camera {self.made}"
            Image.open(file).save(out, "JPEG", exif=exif, quality="keep")
            self.put(file, out.getvalue())

    def edit_words(self) -> None:
        file = self.draw.choice(self.files())
        if self.draw.random() < 0.5:
            words = [f"words {self.draw.randrange(4)}", f"others {self.made}"]
            file.with_suffix(".txt").write_text("\n".join(words))
        else:
            told = {"label": self.draw.randrange(3), "captions": ["from the json"]}
            file.with_suffix(".json").write_text(json.dumps(told))

    def break_image(self) -> None:
        self.put(self.draw.choice(self.files()), b"broken" * self.draw.randrange(1, 9))

    def lock(self) -> None:
        """For one step, the folder below cannot be listed."""
        self.locked = True

    # ------------------------------------------------------------ changes of the tar

    def change_tar(self) -> None:
        act = self.draw.choice(["insert", "insert", "delete", "shuffle", "replace"])
        if act == "insert" or len(self.members) < 2:
            self.made += 1
            at = self.draw.randrange(len(self.members) + 1)
            self.members.insert(at, (f"m{self.made}.jpg", self.some()))
        elif act == "delete":
            self.gone.append(self.members.pop(self.draw.randrange(len(self.members))))
        elif act == "shuffle":
            self.draw.shuffle(self.members)
        else:
            at = self.draw.randrange(len(self.members))
            self.members[at] = (self.members[at][0], self.some())
        self.write_tar()

    def write_tar(self) -> None:
        self.tick(write_tar(self.root / "t.tar", self.members))

    def tear_tar(self) -> None:
        """For one step, the tar breaks off."""
        tar = self.root / "t.tar"
        content = tar.read_bytes()
        self.put(tar, content[: self.draw.randrange(600, 512 * (len(content) // 512) - 1024)])
        self.torn = True

    # ------------------------------------------------------------ changes of the tables

    def change_table(self) -> None:
        name = self.draw.choice(list(self.tables))
        rows = self.tables[name]
        act = self.draw.choice(["insert", "insert", "delete", "shuffle", "words", "image"])
        if act == "insert" or len(rows) < 2:
            self.made += 1
            row = {"image": self.some(), "caption": f"row {self.made}", "id": f"i{self.made}"}
            rows.insert(self.draw.randrange(len(rows) + 1), row)
        elif act == "delete":
            self.gone.append(("x.jpg", rows.pop(self.draw.randrange(len(rows)))["image"]))
        elif act == "shuffle":
            self.draw.shuffle(rows)
        elif act == "words":
            self.draw.choice(rows)["caption"] = f"edited {self.made}"
        else:
            self.draw.choice(rows)["image"] = self.some()
        for name, rows in self.tables.items():
            columns = ["image", "caption"] + (["id"] if name == "ids" else [])
            types = {"image": pa.binary(), "caption": pa.string(), "id": pa.string()}
            table = pa.table({c: pa.array([row[c] for row in rows], types[c]) for c in columns})
            pq.write_table(table, self.root / f"{name}.parquet")
            self.tick(self.root / f"{name}.parquet")

    # ------------------------------------------------------------ a step

    CHANGES: tuple[Callable[["World"], None], ...] = (
        add, delete, come_back, rename, swap, touch, move_folder, edit_image, edit_words,
        break_image, lock, change_tar, change_tar, tear_tar, change_table, change_table,
    )  # fmt: skip

    def step(self) -> list[str]:
        """Change a few things; return what."""
        if self.torn:
            self.write_tar()
        self.torn = self.locked = False
        acts = self.draw.sample(self.CHANGES, self.draw.randrange(1, 4))
        # A tar is torn after it was changed.
        acts.sort(key=lambda act: act is World.tear_tar)
        for act in acts:
            act(self)
        return [act.__name__ for act in acts]


@contextmanager
def locking(folder: Path | None) -> Iterator[None]:
    """Let a folder be one that cannot be listed."""
    scandir = os.scandir

    def refusing(path: Any = ".") -> Any:
        if str(path) == str(folder):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", refusing)
        yield


def fresh(record: Record) -> dict[str, Any] | None:
    """What a new store would say of a sample; None where its image is broken."""
    content = read_image(record)
    if content.startswith(b"broken"):
        return None
    with open_image(content) as image:
        pixels_SS3 = fit_image(image, StubEncoder.preprocess.size, "shortest", "bicubic")
    captions = list(record.captions)
    return {
        "captions": captions,
        "meta": meta_json({**image_meta(content), **record.meta}),
        "stamp": Stamps().of(record),
        "checksum": hashlib.sha256(content).digest(),
        "vectors": [vector(pixels_SS3.tobytes()), *(vector(c.encode()) for c in captions)],
    }


def rows_of(path: Path) -> Rows:
    """What a store holds, by place, with the number of each row."""
    store = open_store(path)
    live = np.arange(len(store)) if store.live is None else np.flatnonzero(store.live)
    found = store.rows(live, CONTENT)
    assert len({row["uri"] for row in found}) == len(found)
    assert len({row["id"] for row in found}) == len(found)
    for number, row in zip(live.tolist(), found, strict=True):
        row["vectors"] = [*store.vectors_of("image", number), *store.vectors_of("text", number)]
    return {row["uri"]: row for row in found}


def same(row: dict[str, Any], other: dict[str, Any]) -> bool:
    vectors = [[v.tobytes() for v in r["vectors"]] for r in (row, other)]
    return {**row, "vectors": vectors[0]} == {**other, "vectors": vectors[1]}


def assert_equal(row: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert {k: row[k] for k in wanted if k != "vectors"} == {
        k: wanted[k] for k in wanted if k != "vectors"
    }
    assert len(row["vectors"]) == len(wanted["vectors"])
    for is_there, expected in zip(row["vectors"], wanted["vectors"], strict=True):
        assert np.allclose(is_there, expected, atol=2e-3)


def check_step(world: World, store: Path) -> EmbedReport:
    before = rows_of(store) if store.exists() else {}
    with locking(world.folder / "sub" if world.locked else None):
        catalog = scan(world.sources())
        report = embed("stub", world.sources(), store, drop_removed=True, yes=True)
    now, expected = rows_of(store), {r.uri: fresh(r) for r in catalog.records}
    good = {uri: row for uri, row in expected.items() if row is not None}
    for uri, row in good.items():
        assert_equal(now[uri], row)
    # What cannot be used now stays as it was, and the report says why. So does what lay where no
    # source is any more, but for what has moved from there. All else is gone.
    unread = uri_prefixes(s.uri for s in catalog.skips if s.affects == "place")
    failed = expected.keys() - good
    others = before.keys() - good
    stays = {uri for uri in others if uri in failed or uri.startswith(unread)}
    elsewhere = {uri for uri in others - stays if not uri.startswith(uri_prefixes(world.sources()))}
    assert stays <= now.keys() - good.keys() <= stays | elsewhere
    for uri in now.keys() - good.keys():
        assert same(now[uri], before[uri])
    listed = {f["uri"] for f in open_store(store).failures()}
    places = {s.uri for s in catalog.skips if s.affects == "place"}
    assert {*failed, *places} <= listed
    bad = sum(s.count for s in catalog.skips if s.affects == "sample")
    assert report.added + report.changed + report.present == len(good)
    assert report.failed == len(failed) + bad
    return report


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
def test_after_any_changes_a_store_is_as_if_it_were_new(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_stub(monkeypatch)
    world, store, told = World(tmp_path / "w", seed), tmp_path / "s.store", []
    for number in range(STEPS):
        try:
            check_step(world, store)
            if not (world.locked or world.torn):
                # At once again: nothing is read but what failed, and nothing computed.
                again = check_step(world, store)
                assert (again.added, again.changed, again.encoded) == (0, 0, 0)
                assert again.read <= again.failed
        except (AssertionError, DataError, KeyError) as error:
            error.add_note(f"seed {seed}, step {number}: {told}")
            raise
        told.append(world.step())
    shutil.rmtree(tmp_path / "w")
