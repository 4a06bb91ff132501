"""Texts that are longer than a model reads are counted and said, wherever texts go in."""

import shutil
from pathlib import Path

import pytest

from mmalign.embedding.embed import embed
from mmalign.evaluation.evaluate import evaluate
from mmalign.model import load_model, new_model, openclip
from mmalign.search.build import build_index
from mmalign.search.searcher import Searcher
from mmalign.training.train import train

from conftest import QUICK, jpeg  # isort: skip

LONG = " ".join(f"word{n}" for n in range(40))


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 pictures; three captions are long, two of them equal."""
    folder = tmp_path_factory.mktemp("wordy")
    for i in range(40):
        (folder / f"{i:02d}.jpg").write_bytes(jpeg(i))
        words = {0: LONG, 1: LONG, 2: LONG + " more"}.get(i, f"picture {i}")
        (folder / f"{i:02d}.txt").write_text(words, encoding="utf-8")
    return folder


def test_tokenizers_tell_which_texts_they_cut(small_clip: str) -> None:
    ours = new_model("nano", ["a red square"]).tokenizer
    fits = "z" * (ours.context - 1)  # type: ignore[attr-defined]
    assert ours.cut(["a red square", fits, fits + "z", ""]) == [fits + "z"]
    assert ours.cut([]) == []
    clip = openclip.load(small_clip, None).tokenizer
    most = clip.backend.context_length - 2  # type: ignore[attr-defined]
    exact, over = " ".join(["dog"] * most), " ".join(["dog"] * (most + 1))
    assert clip.cut(["a dog", exact, over]) == [over]


def test_embedding_and_evaluating_count_captions_that_are_cut(
    run: Path, wordy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = load_model(run).name
    said = f"warning: 2 captions are longer than {name} can read: they were truncated"
    embed(run, [str(wordy)], tmp_path / "s.store", thumbnails=False)
    assert said in capsys.readouterr().err
    evaluate(run, [str(wordy)])
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_training_counts_captions_that_are_cut(
    wordy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train([str(wordy)], tmp_path / "run", QUICK, val=[str(wordy)])
    said = capsys.readouterr().err
    assert said.count("warning: 3 captions are longer than nano can read") == 2


def test_a_long_query_is_answered_and_said(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    searcher = Searcher.open(store)
    assert len(searcher.search("a red circle", k=2)) == 2
    assert "longer" not in capsys.readouterr().err
    assert len(searcher.search(LONG, k=2)) == 2
    assert "warning: the query is longer than nano can read" in capsys.readouterr().err


def test_long_queries_of_a_file_are_counted(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "s.store"
    shutil.copytree(store, copy)
    queries = tmp_path / "queries.txt"
    queries.write_text(f"a red circle\n{LONG}\n", encoding="utf-8")
    build_index(copy, queries=queries)
    assert "warning: 1 queries are longer than nano can read" in capsys.readouterr().err
