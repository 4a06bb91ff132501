"""Pictures beside hits: their escape sequences are decoded back to pixels."""

import base64
import io
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image

from mmalign.cli import thumbs
from mmalign.cli.main import main
from mmalign.data import fit_image, open_image
from mmalign.search.searcher import Hit, Hits, Query
from mmalign.store import open_store
from mmalign.terminal import width

KITTY, PLAIN = {"TERM": "xterm-kitty"}, {"TERM": "xterm-256color"}
TRUE = {**PLAIN, "COLORTERM": "truecolor"}
SEQUENCE = re.compile(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\")
COLOUR = r"(2;\d+;\d+;\d+|5;\d+)"
CELL = re.compile(rf"\x1b\[38;{COLOUR};48;{COLOUR}m▀")
ESCAPES = re.compile(r"\x1b_G.*?\x1b\\|\x1b\[[\d;]*m", re.DOTALL)
BLOCKS = thumbs.SIZES["blocks"]


def picture(columns: int = BLOCKS.columns, rows: int = BLOCKS.columns) -> NDArray[np.uint8]:
    """Random pixels, (rows, columns, 3)."""
    return np.random.default_rng(0).integers(0, 256, (rows, columns, 3)).astype(np.uint8)


def png(pixels: NDArray[np.uint8]) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def colour(code: str) -> tuple[int, ...]:
    """The colour that a terminal shows for the numbers behind 38 or 48."""
    mode, *parts = map(int, code.split(";"))
    if mode == 2:
        return tuple(parts)
    (number,) = parts
    if number >= 232:
        return (8 + 10 * (number - 232),) * 3
    levels = (0, 95, 135, 175, 215, 255)
    number -= 16
    return levels[number // 36], levels[number // 6 % 6], levels[number % 6]


def pixels_of(lines: list[str]) -> NDArray[np.uint8]:
    """What a terminal shows for lines of blocks, two rows of pixels for each line."""
    rows = []
    for line in lines:
        assert line.endswith(thumbs.RESET)
        cells = CELL.findall(line)
        assert "".join(f"\x1b[38;{a};48;{b}m▀" for a, b in cells) + thumbs.RESET == line
        rows += [[colour(cell[half]) for cell in cells] for half in (0, 1)]
    return np.array(rows, np.uint8)


def test_blocks_have_the_colours_of_the_picture() -> None:
    pixels = picture()
    lines = thumbs.lines("blocks", png(pixels), TRUE)
    assert np.array_equal(pixels_of(lines), pixels)
    assert len(lines) == BLOCKS.rows


def test_a_wide_picture_is_cut_to_its_centre() -> None:
    pixels = picture(columns=3 * BLOCKS.columns)
    shown = pixels_of(thumbs.lines("blocks", png(pixels), TRUE))
    assert np.array_equal(shown, pixels[:, BLOCKS.columns : 2 * BLOCKS.columns])


def test_256_colours_are_the_nearest_ones() -> None:
    pixels = picture()
    pixels[0] = 128  # a grey that the cube lacks
    shown = pixels_of(thumbs.lines("blocks", png(pixels), PLAIN)).astype(int)
    known = np.array([colour(f"5;{number}") for number in range(16, 256)])
    off = ((known[:, None] - pixels.reshape(-1, 3).astype(int)) ** 2).sum(axis=2)
    chosen = ((shown - pixels.astype(int)) ** 2).sum(axis=2)
    assert np.array_equal(chosen.reshape(-1), off.min(axis=0))
    assert (shown[0] == 128).all()


def sent(text: str) -> tuple[dict[str, str], bytes]:
    """The keys and the content of a picture that was sent in parts."""
    keys, parts = {}, []
    found = SEQUENCE.findall(text)
    for number, (told, part) in enumerate(found):
        mine = dict(pair.split("=") for pair in told.split(","))
        keys = keys or mine
        assert mine["q"] == "2"
        assert mine["m"] == str(int(number < len(found) - 1))
        assert len(part) <= 4096
        parts.append(part)
    return keys, base64.b64decode("".join(parts))


@pytest.mark.parametrize("side", [8, 160])
def test_kitty_gets_the_picture_and_cells_that_show_it(side: int) -> None:
    size = thumbs.SIZES["kitty"]
    lines = thumbs.lines("kitty", png(picture(side, side)), KITTY)
    keys, content = sent("".join(lines))
    assert np.array_equal(np.array(open_image(content)), picture(side, side))
    told = {"a": "T", "U": "1", "f": "100", "c": str(size.columns), "r": str(size.rows)}
    assert told.items() <= keys.items()
    assert len(lines) == size.rows
    for row, line in enumerate(lines):
        shown = SEQUENCE.sub("", line)
        start, text = re.fullmatch(r"\x1b\[38;2;([\d;]+)m(.*)\x1b\[0m", shown).groups()  # type: ignore[union-attr]
        red, green, blue = map(int, start.split(";"))
        assert red << 16 | green << 8 | blue == int(keys["i"])
        cells = [(row, column) for column in range(size.columns)]
        assert text == "".join(
            f"\U0010eeee{thumbs.NUMBERS[r]}{thumbs.NUMBERS[c]}" for r, c in cells
        )


def test_tmux_passes_on_the_same_picture() -> None:
    content = png(picture(160, 160))
    text = "".join(thumbs.lines("kitty", content, {"TERM": "tmux-256color", "TMUX": "/x,1,0"}))
    passed = re.sub(
        r"\x1bPtmux;((?:\x1b\x1b|[^\x1b])*)\x1b\\",
        lambda found: found[1].replace("\x1b\x1b", "\x1b"),
        text,
    )
    assert passed == "".join(thumbs.lines("kitty", content, KITTY))
    assert "\x1bPtmux;" not in passed


@pytest.mark.parametrize("how", ["kitty", "blocks"])
@pytest.mark.parametrize("content", [b"", b"RIFF\x10\0\0\0WEBPVP8 damaged", b"\x1b[31m"])
def test_what_is_no_picture_is_an_empty_place(how: str, content: bytes) -> None:
    size = thumbs.SIZES[how]
    assert thumbs.lines(how, content, KITTY) == [" " * size.columns] * size.rows


@pytest.mark.parametrize(
    ("environment", "terminal", "shown"),
    [
        (KITTY, True, "kitty"),
        ({"TERM": "xterm-ghostty"}, True, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "ghostty"}, True, "kitty"),
        (KITTY, False, None),
        ({**KITTY, "NO_COLOR": "1"}, True, None),
        ({**KITTY, "NO_COLOR": ""}, True, "kitty"),
        ({**KITTY, "TMUX": "/tmp/tmux-0/default,1,0"}, True, None),
        ({"TERM": "screen-256color", "TERM_PROGRAM": "tmux", "KITTY_WINDOW_ID": "1"}, True, None),
        ({"TERM": "dumb"}, True, None),
        (TRUE, True, None),
        ({}, True, None),
    ],
)
def test_auto_shows_pictures_only_where_they_are_sharp(
    environment: dict[str, str], terminal: bool, shown: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdout = SimpleNamespace(isatty=lambda: terminal, encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert thumbs.way("auto", environment) == shown
    assert [thumbs.way(wanted, environment) for wanted in ("kitty", "blocks", "off")] == [
        "kitty", "blocks", None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("utf-8", "blocks"), ("cp437", "blocks"), ("latin-1", None), ("ascii", None)],
)
def test_blocks_need_a_console_that_can_print_them(
    encoding: str, shown: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True, encoding=encoding))
    assert thumbs.way("blocks", TRUE) == shown
    assert thumbs.way("kitty", KITTY) == ("kitty" if encoding == "utf-8" else None)


@pytest.fixture
def hits(monkeypatch: pytest.MonkeyPatch) -> list[Hit]:
    """What `mmalign search` finds: with a picture, without one, and with a path too long to fit."""
    found = [
        Hit(1, "a", 0.5, "a.jpg", ("一只狗在海滩上" * 30,), 0, thumbnail=png(picture())),
        Hit(2, "b", 0.4, "b.jpg", (), 1, thumbnail=b""),
        Hit(3, "c", 0.3, "c" * 200 + ".jpg", ("a\x1b[31m dog",), 2, thumbnail=png(picture())),
    ]

    def search(*_: Any, thumbnails: bool, **__: Any) -> Hits:
        shown = found if thumbnails else [replace(hit, thumbnail=None) for hit in found]
        return Hits(Query((("red", 1.0),)), tuple(shown))

    searcher = SimpleNamespace(search=search, describe_index=dict)
    monkeypatch.setattr("mmalign.store.open_store", lambda _: SimpleNamespace(fields=()))
    monkeypatch.setattr("mmalign.search.model.model_of", lambda *_: None)
    monkeypatch.setattr("mmalign.search.searcher.Searcher", lambda *_: searcher)
    monkeypatch.setattr("mmalign.cli.hits.columns", lambda: 60)
    return found


def output(*words: str, **environment: str) -> str:
    runner = CliRunner(env={"TERM": "xterm-kitty", "NO_COLOR": None, "TMUX": None, **environment})
    result = runner.invoke(main, ["search", "s", "red", *words])
    assert result.exception is None, result.exception
    return result.stdout


def test_text_is_aligned_beside_pictures(hits: list[Hit]) -> None:
    out = output("--table", "--thumbs", "blocks", COLORTERM="truecolor")
    every = out.split("\n")
    assert len(every) == len(hits) * (BLOCKS.rows + 1)
    for number, hit in enumerate(hits):
        *lines, between = every[number * (BLOCKS.rows + 1) :][: BLOCKS.rows + 1]
        assert between == ""
        beside = [ESCAPES.sub("", line)[BLOCKS.columns + 2 :] for line in lines]
        assert beside[0] == f"{hit.rank:>3}  {hit.score:.3f}"
        assert [width(text) <= 60 - BLOCKS.columns - 2 for text in beside[:2]] == [True] * 2
        # A path that does not fit goes on below the picture, so it is the last line.
        assert beside.index(hit.uri) == (7 if len(hit.uri) > 60 else 1 + bool(hit.captions))
        if hit.thumbnail:
            own = [line[: line.index(thumbs.RESET) + len(thumbs.RESET)] for line in lines]
            assert np.array_equal(pixels_of(own), picture())
        else:
            assert "\x1b" not in "".join(lines)
    assert "一只狗在海滩上" in every[1]
    assert "\\x1b[31m dog" in every[2 * BLOCKS.rows + 3]


@pytest.mark.parametrize("words", [["--table"], [], ["--json"], ["--csv", "--thumbs", "blocks"]])
def test_nothing_is_added_to_what_is_piped(hits: list[Hit], words: list[str]) -> None:
    assert "\x1b" not in output(*words)
    assert "▀" not in output(*words)
    assert "\U0010eeee" not in output(*words)


def test_a_narrow_terminal_has_no_room(hits: list[Hit], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmalign.cli.hits.columns", lambda: BLOCKS.columns + 21)
    assert "▀" not in output("--table", "--thumbs", "blocks")


@pytest.mark.slow
def test_pictures_come_from_the_store(store: Path) -> None:
    words = ("search", str(store), "a red star", "--table", "--no-group", "-k", "1")
    result = CliRunner(env=TRUE).invoke(main, [*words, "--thumbs", "blocks"])
    assert result.exit_code in (0, 1), result.output
    lines = [line[: line.index(thumbs.RESET) + 4] for line in result.stdout.splitlines()]
    pictures = [row["thumbnail"] for row in open_store(store).rows(range(96), ("thumbnail",))]
    side = BLOCKS.columns
    known = [fit_image(open_image(content), side, "shortest") for content in pictures]
    assert any(np.array_equal(pixels_of(lines), each) for each in known)
