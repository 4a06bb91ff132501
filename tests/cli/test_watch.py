"""`mmalign watch`: the store of a folder, kept up to date while the folder changes."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command import call, complaint
from conftest import jpeg, write_pairs
from stub_encoder import StubEncoder, stub, use_stub

from mmalign.cli.watcher import IDLE_S, LONGEST_PAUSE_S, PATIENCE_S, Watcher
from mmalign.data import fingerprint
from mmalign.embedding import embed as embedding
from mmalign.errors import ModelError, StoreError
from mmalign.locks import sole_user
from mmalign.search.searcher import Searcher
from mmalign.store import delete, open_store


class Time:
    """A clock that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Models:
    """Loads the stub, and counts how often."""

    def __init__(self) -> None:
        self.loaded = 0

    def __call__(self, store: Any, model: Any = None) -> Any:
        self.loaded += 1
        return stub(store.manifest.model.source)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Models:
    use_stub(monkeypatch)
    made = Models()

    def loaded(model: Any) -> Any:
        return model if isinstance(model, StubEncoder) else stub(model)

    monkeypatch.setattr("mmalign.embedding.embed.load_model", loaded)
    monkeypatch.setattr("mmalign.search.model.model_of", made)
    return made


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "photos", 12)


@pytest.fixture
def watcher(photos: Path, tmp_path: Path, models: Models) -> Watcher:
    """A watcher of a store that is up to date."""
    embedding.embed("stub", str(photos), tmp_path / "a.store")
    return watching(photos, tmp_path / "a.store")


def watching(folder: Path, store: Path, **settings: Any) -> Watcher:
    time = Time()
    return Watcher(
        folder, str(folder), store, every=2.0, clock=time, sleep=time.sleep, **settings
    )  # fmt: skip


def looks(watcher: Watcher, count: int = 2) -> None:
    for _ in range(count):
        watcher.sleep(watcher.look())


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line]


def names(store: Path) -> set[str]:
    return {Path(uri).name for uri in open_store(store).column("uri")}


def test_a_change_set_is_one_line_and_nothing_else(
    watcher: Watcher, photos: Path, models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    looks(watcher)
    capsys.readouterr()
    assert models.loaded == 0
    for number in range(20, 23):
        (photos / f"{number:03d}.jpg").write_bytes(jpeg(number))
    (photos / "001.jpg").write_bytes(jpeg(99))
    (photos / "000.jpg").unlink()
    (photos / "002.jpg").rename(photos / "moved.jpg")
    looks(watcher, 4)
    assert said(capsys) == ["3 new, 2 changed (1 moved), 1 gone; 14 rows"]
    assert names(watcher.store) == {p.name for p in photos.glob("*.jpg")}
    assert models.loaded == 1
    (photos / "003.jpg").unlink()
    looks(watcher)
    assert said(capsys) == ["0 new, 0 changed, 1 gone; 13 rows"]


def test_what_changes_no_row_is_not_told_and_needs_no_model(
    watcher: Watcher, photos: Path, models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    looks(watcher)
    capsys.readouterr()
    (photos / "notes.md").write_text("no image")
    (photos / ".hidden.jpg").write_bytes(jpeg(50))
    (photos / "folder").mkdir()
    looks(watcher, 3)
    assert (said(capsys), models.loaded) == ([], 0)


def test_a_file_is_read_when_it_no_longer_changes(watcher: Watcher, photos: Path) -> None:
    looks(watcher)
    content = jpeg(30, (200, 150))
    for end in (100, 1000, len(content)):
        (photos / "copied.jpg").write_bytes(content[:end])
        looks(watcher, 1)
        assert "copied.jpg" not in names(watcher.store)
    looks(watcher, 1)
    assert "copied.jpg" in names(watcher.store)
    assert open_store(watcher.store).failures() == []


def test_constant_change_is_waited_for_a_minute(watcher: Watcher, photos: Path) -> None:
    looks(watcher)
    for number in itertools.count(100):
        assert number < 100 + PATIENCE_S
        (photos / f"{number}.jpg").write_bytes(jpeg(number))
        looks(watcher, 1)
        if len(open_store(watcher.store)) > 12:
            break
    assert number >= 100 + PATIENCE_S / watcher.every
    assert len(open_store(watcher.store)) == 12 + number - 99


@pytest.mark.parametrize("yes", [False, True])
@pytest.mark.parametrize("mount_point", [False, True])
def test_an_unplugged_drive_empties_nothing(
    watcher: Watcher, photos: Path, yes: bool, mount_point: bool, models: Models,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    watcher.yes = yes
    looks(watcher)
    capsys.readouterr()
    away = photos.rename(photos.parent / "drive")
    if mount_point:
        photos.mkdir()
    looks(watcher, 200)
    (line,) = said(capsys)
    assert line.startswith(f"warning: {photos}: no ")
    assert "the rows stay" in line or "all rows stay" in line
    assert len(open_store(watcher.store)) == 12
    (away / "new.jpg").write_bytes(jpeg(40))
    if mount_point:
        photos.rmdir()
    away.rename(photos)
    looks(watcher, 3)
    assert said(capsys)[-1] == "1 new, 0 changed, 0 gone; 13 rows"


@pytest.mark.parametrize("yes", [False, True])
@pytest.mark.parametrize("mount_point", [False, True])
def test_a_drive_inside_the_folder_takes_no_rows_with_it(
    photos: Path, tmp_path: Path, models: Models, yes: bool, mount_point: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    drive = write_pairs(photos / "drive", 5)
    embedding.embed("stub", str(photos), tmp_path / "a.store")
    shutil.rmtree(drive)
    if mount_point:
        drive.mkdir()
    watcher = watching(photos, tmp_path / "a.store", yes=yes)
    capsys.readouterr()
    looks(watcher, 20)
    (line,) = said(capsys)
    assert "5 of 17 rows stay" in line
    assert f"`mmalign embed --model stub --data {photos}" in line
    assert len(open_store(watcher.store)) == 17
    # What happens beside it is embedded all the same, and the warning is not repeated.
    (photos / "new.jpg").write_bytes(jpeg(41))
    looks(watcher, 4)
    assert said(capsys)[-1] == "1 new, 0 changed, 0 gone; 18 rows"


def test_many_images_are_dropped_only_with_yes(
    watcher: Watcher, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(6):
        (photos / f"{number:03d}.jpg").unlink()
    looks(watcher)
    assert "6 of 12 rows stay" in said(capsys)[-1]
    again = watching(photos, watcher.store, yes=True)
    looks(again)
    assert said(capsys) == ["0 new, 0 changed, 6 gone; 6 rows"]


def test_many_that_were_renamed_are_not_gone(
    watcher: Watcher, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    looks(watcher)
    capsys.readouterr()
    (photos / "2024").mkdir()
    for number in range(8):
        (photos / f"{number:03d}.jpg").rename(photos / "2024" / f"{number:03d}.jpg")
    looks(watcher)
    assert said(capsys) == ["0 new, 8 changed (8 moved), 0 gone; 12 rows"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), StoreError("a.store: somebody else writes")]
)
def test_what_passes_does_not_end_the_watch(
    watcher: Watcher, photos: Path, error: Exception, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    looks(watcher)
    capsys.readouterr()
    (photos / "new.jpg").write_bytes(jpeg(42))
    tried: list[float] = []

    def fail(*_: object, **__: object) -> None:
        tried.append(watcher.clock())
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("mmalign.embedding.embed.embed", fail)
        looks(watcher, 600)
    (line,) = said(capsys)
    assert "it is tried again" in line
    pauses = [b - a for a, b in itertools.pairwise(tried)]
    assert pauses[0] <= 2 * watcher.every
    assert max(pauses) <= LONGEST_PAUSE_S + watcher.every
    assert len(tried) < 20
    looks(watcher, int(LONGEST_PAUSE_S / watcher.every) + 1)
    assert said(capsys) == ["1 new, 0 changed, 0 gone; 13 rows"]


def test_a_file_that_cannot_be_read_yet_is_tried_again(
    watcher: Watcher, photos: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from mmalign.data import places

    looks(watcher)
    capsys.readouterr()
    (photos / "locked.jpg").write_bytes(jpeg(43))
    read = places.read

    def refuse(place: str, *rest: Any, **words: Any) -> bytes:
        if "locked.jpg" in place:
            raise PermissionError(13, "Permission denied", place)
        return read(place, *rest, **words)

    with monkeypatch.context() as patch:
        patch.setattr(places, "read", refuse)
        looks(watcher, 20)
    lines = [line for line in said(capsys) if not line.startswith("warning: 1 of 13 samples")]
    assert lines == [
        f"0 new, 0 changed, 0 gone, 1 failed (listed in {watcher.store / 'failures.jsonl'}); "
        "12 rows"
    ]
    looks(watcher, 50)
    assert said(capsys) == ["1 new, 0 changed, 0 gone; 13 rows"]


def test_a_missing_model_ends_the_watch(
    watcher: Watcher, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise ModelError("the model stub is not found")

    monkeypatch.setattr("mmalign.search.model.model_of", missing)
    looks(watcher)
    (photos / "new.jpg").write_bytes(jpeg(44))
    with pytest.raises(ModelError):
        looks(watcher)


def test_the_model_is_kept_for_a_while(watcher: Watcher, photos: Path, models: Models) -> None:
    looks(watcher)
    for number in range(50, 53):
        (photos / f"{number}.jpg").write_bytes(jpeg(number))
        looks(watcher)
    assert models.loaded == 1
    looks(watcher, int(IDLE_S / watcher.every) + 2)
    assert watcher._encoder is None
    (photos / "late.jpg").write_bytes(jpeg(54))
    looks(watcher)
    assert models.loaded == 2


def test_an_encoder_is_not_used_for_the_store_of_another_model(
    watcher: Watcher, photos: Path, models: Models
) -> None:
    (photos / "one.jpg").write_bytes(jpeg(60))
    looks(watcher, 2)
    embedding.embed("other", str(photos), watcher.store)
    (photos / "two.jpg").write_bytes(jpeg(61))
    looks(watcher, 2)
    store = open_store(watcher.store)
    assert (store.manifest.model.source, len(store)) == ("other", 14)


def test_rows_that_somebody_deleted_come_back_with_the_next_change(
    watcher: Watcher, photos: Path
) -> None:
    looks(watcher)
    delete(watcher.store, [open_store(watcher.store).column("id")[0]])
    (photos / "new.jpg").write_bytes(jpeg(62))
    looks(watcher)
    assert len(open_store(watcher.store)) == 13


def test_a_slow_folder_is_looked_at_less_often(
    watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(folder: str) -> str:
        watcher.sleep(3.0)
        return fingerprint(folder)

    monkeypatch.setattr("mmalign.data.fingerprint", slow)
    assert watcher.look() == pytest.approx(27.0)


def stop_after(count: int, act: Callable[[int], None] = lambda step: None) -> Any:
    """Return a sleep that does something at each step, and is interrupted at the last."""
    steps = itertools.count(1)

    def sleep(seconds: float) -> None:
        step = next(steps)
        act(step)
        if step == count:
            raise KeyboardInterrupt

    return sleep


def test_the_store_may_go_and_come_back(
    watcher: Watcher, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = tmp_path / "away"

    def act(step: int) -> None:
        if step == 2:
            watcher.store.rename(away)
        if step == 6:
            (photos / "new.jpg").write_bytes(jpeg(63))
            away.rename(watcher.store)

    watcher.sleep = stop_after(12, act)
    with pytest.raises(KeyboardInterrupt):
        watcher.run()
    lines = said(capsys)
    assert sum("no such store any more" in line for line in lines) == 1
    assert lines[-1] == "1 new, 0 changed, 0 gone; 13 rows"


def test_one_watch_for_a_store(watcher: Watcher) -> None:
    with sole_user(watcher.store), pytest.raises(StoreError, match="another watch"):
        watcher.run()


def test_the_first_pass_makes_the_store_at_once(
    photos: Path, tmp_path: Path, models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    watcher = watching(photos, tmp_path / "new.store", model="stub")
    watcher.sleep = stop_after(1)
    with pytest.raises(KeyboardInterrupt):
        watcher.run()
    assert len(open_store(watcher.store)) == 12
    assert "12 added" in capsys.readouterr().err
    (photos / "new.jpg").write_bytes(jpeg(64))
    again = watching(photos, watcher.store)
    again.sleep = stop_after(1)
    with pytest.raises(KeyboardInterrupt):
        again.run()
    assert said(capsys)[-1] == "1 new, 0 changed, 0 gone; 13 rows"


def test_a_fingerprint_goes_by_what_a_scan_may_find(photos: Path) -> None:
    def differs(act: Callable[[], object]) -> bool:
        before = fingerprint(str(photos))
        act()
        return fingerprint(str(photos)) != before

    jpg = photos / "000.jpg"
    assert not differs(lambda: None)
    assert differs(lambda: (photos / "new").write_bytes(b"perhaps an image"))
    assert differs(lambda: os.utime(jpg, ns=(0, 1)))
    assert differs(lambda: (photos / "000.json").write_text("{}"))
    assert differs(lambda: jpg.rename(photos / "other.jpg"))
    assert differs((photos / "other.jpg").unlink)
    assert not differs(lambda: (photos / "a.log").write_text("a line"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--every", "0"], "--every 0: give from 0.1 to 86400 seconds"),
        (["--every", "nan"], "--every nan"),
        (["--here", "--store", "a.store"], "give either --store or --here"),
        (["--store", "{photos}/a.store", "--model", "x"], "is inside the source"),
    ],
)
def test_wrong_arguments(photos: Path, words: list[str], told: str) -> None:
    assert told in complaint(2, "watch", photos, *(w.format(photos=photos) for w in words))


def test_what_is_no_folder_of_images(photos: Path, store: Path, tmp_path: Path) -> None:
    assert "a store: give a folder of images" in complaint(2, "watch", store)
    assert "not a folder" in complaint(2, "watch", photos / "000.jpg")
    new = ["--store", tmp_path / "new.store"]
    assert "nowhere: no such folder" in complaint(1, "watch", tmp_path / "nowhere", *new)
    assert not (tmp_path / "new.store").exists()


def test_ctrl_c_has_the_exit_code_of_all_commands(
    photos: Path, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", stop_after(1))
    monkeypatch.setattr(Watcher.__init__, "__defaults__", (
        *Watcher.__init__.__defaults__[:4], time.sleep, *Watcher.__init__.__defaults__[5:],  # type: ignore[index]
    ))  # fmt: skip
    done = call("watch", photos, "--model", "stub", "--store", tmp_path / "new.store")
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (130, "mmalign: interrupted")
    assert len(open_store(tmp_path / "new.store")) == 12


def within(seconds: float, is_so: Callable[[], bool]) -> Iterator[None]:
    """Yield until something is so; fail if that takes too long."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it took too long"
        yield


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM")
def test_a_search_elsewhere_finds_what_a_watch_commits(
    photos: Path, run: Path, tmp_path: Path
) -> None:
    store = tmp_path / "a.store"
    embedding.embed(run, str(photos), store)
    words = [sys.executable, "-m", "mmalign", "watch", photos, "--store", store, "--every", "0.1"]
    log = tmp_path / "log"
    with open(log, "wb") as stderr:
        process = subprocess.Popen(list(map(str, words)), stderr=stderr)
    try:
        for _ in within(120, lambda: "watched until" in log.read_text(encoding="utf-8")):
            assert process.poll() is None
            time.sleep(0.05)
        second = subprocess.run(
            list(map(str, words)), capture_output=True, text=True, check=False, timeout=120
        )
        assert second.returncode == 1
        assert "another watch" in second.stderr
        searcher = Searcher.open(store)
        (photos / "new.jpg").write_bytes(jpeg(70))
        for _ in within(120, searcher.refresh):
            time.sleep(0.05)
        hits = searcher.search(photos / "new.jpg", k=1)
        assert Path(hits[0].uri).name == "new.jpg"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
    told = log.read_text(encoding="utf-8")
    assert "1 new, 0 changed, 0 gone; 13 rows" in told
    assert told.endswith("mmalign: terminated\n")
    # The lock went with the process.
    with sole_user(store) as alone:
        assert alone
