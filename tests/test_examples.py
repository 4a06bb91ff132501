"""The examples run, from another folder than the project's."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import jpeg

from mmalign import Row, Searcher, load_model, open_store

EXAMPLES = Path(__file__).parents[1] / "examples"


def output(name: str, *words: str | Path, folder: Path) -> list[str]:
    command = [sys.executable, str(EXAMPLES / name), *map(str, words)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.slow
def test_the_examples_run(store: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(jpeg())
    assert len(output("more_like_this.py", store, "a red circle", folder=tmp_path)) == 6
    mixed = "a red circle + 0.5:@cat.jpg - 0.5:stripes"
    read_as, *found = output("mixed_query.py", store, mixed, folder=tmp_path)
    assert (read_as, len(found)) == (f"read as: {mixed}", 10)
    found = output("label_images.py", run, ".", "a red circle", "a star", folder=tmp_path)
    assert found in (["cat.jpg: a red circle"], ["cat.jpg: a star"])


@pytest.mark.slow
def test_a_third_modality_is_embedded_and_searched_across(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "things"
    folder.mkdir()
    (folder / "cat.jpg").write_bytes(jpeg())
    (folder / "cat.txt").write_text("a cat")
    (folder / "warm.palette").write_text("#c83c3c\n#ffa000\n#ffe000\n")
    (folder / "warm.txt").write_text("sunset colours")
    (folder / "cold.palette").write_text("#2040c0")
    words = (run, "things", "things.store", "a red circle")
    found = [line.split() for line in output("palettes.py", *words, folder=tmp_path)]
    assert {(modality, name) for modality, _, name, *_ in found} == {
        ("image", "things/cat.jpg"),
        ("text", "things/cat.jpg"),
        ("text", "things/warm.palette"),
        ("palette", "things/warm.palette"),
        ("palette", "things/cold.palette"),
    }
    store = open_store(tmp_path / "things.store")
    assert store.modalities == ("image", "text", "palette")
    assert len(store.vectors("palette")[0]) == 4
    # What is not registered here stays readable, and can be searched by everything else.
    searcher = Searcher(store, load_model(run))
    assert len(searcher.search("a red circle", to="palette")) == 2
    assert len(searcher.search(Row("things/warm.palette"), to="image")) == 1


@pytest.mark.slow
def test_every_example_is_run() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert [p.name for p in EXAMPLES.glob("*.py") if f'"{p.name}"' not in text] == []
