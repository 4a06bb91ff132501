"""Figures are measured once on a machine, and whatever happens to their file is no error."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmalign import measured
from mmalign.measured import Figures

WAYS = ("plain", "fast")
CALL = (
    "from mmalign import measured\n"
    "print(measured.measured('search', {'rows': 10}, ('plain', 'fast'),"
    " lambda: print('measured') or {'plain': 2.0, 'fast': 1.0}))"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measured, "_known", {})
    return tmp_path / "cache"


class Counted:
    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Figures:
        self.times += 1
        return {"plain": 2.0, "fast": float(self.times)}


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process."""
    monkeypatch.setattr(measured, "_known", {})


def ask(measure: Callable[[], Figures], **conditions: str | int) -> Figures:
    return measured.measured("search", conditions or {"rows": 10}, WAYS, measure)


def test_it_is_measured_once_and_found_by_later_processes(folder: Path) -> None:
    for wanted in (["measured"], []):
        result = subprocess.run(
            [sys.executable, "-c", CALL], check=True, capture_output=True, text=True
        )
        assert result.stdout.splitlines() == [*wanted, "{'plain': 2.0, 'fast': 1.0}"]
    (file,) = folder.iterdir()
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert kept["key"]["rows"] == "10"
    assert {"processor", "cores", "torch", "mmalign"} <= kept["key"].keys()


def test_other_conditions_are_measured_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = Counted()
    assert ask(count, rows=10) == ask(count, rows=10) != ask(count, rows=20)
    assert count.times == 2
    forget(monkeypatch)
    monkeypatch.setattr(measured, "machine", lambda: {"processor": "another"})
    ask(count, rows=10)
    assert count.times == 3
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize(
    "damage",
    [
        "", "[]", "{", "null", '{"key": 1}', "\udc80", "[" * 100000,
        '{"figures": {"plain": 1}}', '{"figures": {"plain": "a", "fast": 1}}',
        '{"figures": {"plain": NaN, "fast": 1}}',
    ],
)  # fmt: skip
def test_a_damaged_record_is_measured_again(
    damage: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = Counted()
    ask(count)
    (file,) = folder.iterdir()
    key = json.loads(file.read_text(encoding="utf-8"))["key"]
    content = damage
    if "figures" in damage:
        content = json.dumps({"key": key, **json.loads(damage)})
    file.write_text(content, encoding="utf-8", errors="surrogateescape")
    forget(monkeypatch)
    assert ask(count)["fast"] == 2.0
    forget(monkeypatch)
    assert ask(count)["fast"] == 2.0, "not recorded again"


def test_a_folder_that_cannot_be_written_or_read_is_no_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none"), tmp_path):
        monkeypatch.setenv("MMALIGN_CACHE", str(place))
        forget(monkeypatch)
        count = Counted()
        if place == tmp_path:

            def full(*_: object) -> None:
                raise OSError(28, os.strerror(28))

            monkeypatch.setattr(measured, "write_json", full)
        assert ask(count) == ask(count)
        assert count.times == 1, "in one process it is measured once even so"


def test_off_keeps_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMALIGN_CACHE", "off")
    monkeypatch.chdir(folder.parent)
    ask(Counted())
    assert list(folder.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("system", "variables", "wanted"),
    [
        ("linux", {}, "home/.cache/mmalign"),
        ("linux", {"XDG_CACHE_HOME": "xdg"}, "xdg/mmalign"),
        ("darwin", {"XDG_CACHE_HOME": "xdg"}, "home/Library/Caches/mmalign"),
        ("win32", {"LOCALAPPDATA": "local"}, "local/mmalign/Cache"),
        ("win32", {}, "home/AppData/Local/mmalign/Cache"),
    ],
)
def test_the_folder_is_where_the_system_keeps_caches(
    system: str, variables: dict[str, str], wanted: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name in ("MMALIGN_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert measured.cache_folder() == tmp_path / wanted


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MMALIGN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "home", none)
    assert measured.cache_folder() is None
