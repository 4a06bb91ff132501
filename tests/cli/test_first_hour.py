"""What somebody sees who tries the commands for the first time, and mistypes some."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from command import answer, call, complaint
from conftest import jpeg, write_pairs

from mmalign.cli.main import main


@pytest.fixture
def own_store(store: Path, tmp_path: Path) -> Path:
    """A copy of the store that a test may change."""
    return shutil.copytree(store, tmp_path / "own.store")


# ---------------------------------------------------------------- help


def test_the_list_of_commands_cuts_no_sentence_and_follows_the_path() -> None:
    shown = call("--help").stdout.split("Commands:")[1]
    assert "..." not in shown
    names = [line.split()[0] for line in shown.strip().splitlines()]
    assert names == list(main.commands)
    assert names[:5] == ["demo", "train", "embed", "index", "search"]


def examples() -> list[list[str]]:
    """The words of every example of a --help."""
    lines = [line for c in main.commands.values() for line in (c.help or "").splitlines()]
    found = [line.strip().removeprefix("Example:").strip() for line in lines]
    calls = [part for line in found if line.startswith("mmalign ") for part in line.split(" && ")]
    return [shlex.split(call)[1:] for call in calls]


# Weights from a network, minutes of work, a run that was stopped, and what never ends.
NOT_HERE = {"ViT-B-32", "ViT-B-32:openai", "demo", "--resume", "watch"}


@pytest.mark.slow
def test_examples_of_every_help_work_as_they_are_printed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MMALIGN_STORES", str(tmp_path / "stores"))
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, name in enumerate(("cat", "dog", *map(str, range(22)))):
        (photos / f"{name}.jpg").write_bytes(jpeg(number))
        about = {"captions": [f"a {name}"], "captions_zh": ["图"], "price": number}
        label = ("dress", "hat")[number % 2]
        (photos / f"{name}.json").write_text(json.dumps({**about, "label": label}))
    shutil.copy(photos / "cat.jpg", "cat.jpg")
    for tar in ("val", *(f"pairs-{i:03d}" for i in range(6))):
        shutil.make_archive(tar, "tar", photos)
    tried = [words for words in examples() if not NOT_HERE & set(words)]
    assert {words[0] for words in tried} == set(main.commands) - {"demo", "import", "watch"}
    for words in tried:
        few = []
        if words[0] == "train":
            shutil.rmtree("run", ignore_errors=True)
            few = ["--set", "batch_size=4", "--set", "epochs=0.1"]
        elif not Path("photos.store").exists():
            shutil.rmtree("run", ignore_errors=True)
            shutil.copytree(run, "run")
        for other in {"more.store", "scans.store"} & set(words):
            shutil.copytree("photos.store", other, dirs_exist_ok=True)
        done = call(*words, *few)
        # What a hardly trained model finds is left open: 1 is "nothing found".
        assert done.exit_code in ((0, 1) if words[0] == "search" else (0,)), (words, done.output)


# ---------------------------------------------------------------- answers


def test_small_and_large_numbers_are_shown_by_their_first_digits(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmalign.cli.options import print_values

    print_values({"rate": 2e-5, "none": 0.0, "bytes": 1035971223.02, "recall": 0.95}, False)
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert shown == {
        "rate": "2.00e-05",
        "none": "0.0000",
        "bytes": "1035971223",
        "recall": "0.9500",
    }


def test_info_tells_of_an_index_in_a_line_and_how_to_build_one(own_store: Path) -> None:
    before = call("info", own_store).stdout
    assert f"`mmalign index {own_store}` builds one" in before
    assert call("index", own_store).exit_code == 0
    after = call("info", own_store).stdout
    assert re.search(r"^index +images: exact search over 96$", after, re.M)
    assert len(after.splitlines()) < 15
    assert answer("info", own_store)["index"]["modalities"]["image"]["kind"] == "exact"


def test_a_search_without_hits_says_so(store: Path) -> None:
    done = call("search", store, "red", "--where", "id = 'nobody'", "--table")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "nothing found: no row matches the filters\n"


def test_a_modality_that_the_store_does_not_have_is_refused(store: Path) -> None:
    said = complaint(2, "search", store, "red", "--to", "texts")
    assert "no 'texts' vectors to search: did you mean 'text'" in said


def test_a_row_whose_id_is_its_place_is_shown_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pairs(tmp_path / "photos", 2)
    monkeypatch.chdir(tmp_path)
    assert call("embed", "--model", run, "--data", "photos", "--out", "p.store").exit_code == 0
    shown = call("delete", "p.store", "photos/000.jpg", "--dry-run").stdout
    assert shown == "photos/000.jpg\n1 would be deleted; p.store has 2 rows\n"


# ---------------------------------------------------------------- mistakes


def test_a_sheet_for_no_folder_is_refused_before_anything_is_searched(tmp_path: Path) -> None:
    (tmp_path / "s.store").mkdir()
    said = complaint(2, "search", tmp_path / "s.store", "red", "--sheet", tmp_path / "no/hits.png")
    assert f"the folder {tmp_path / 'no'} does not exist" in said


def test_no_message_names_a_temporary_file(tmp_path: Path) -> None:
    from mmalign import files

    with pytest.raises(FileNotFoundError) as caught:
        files.write_bytes(tmp_path / "no" / "x.png", b"")
    assert caught.value.filename == str(tmp_path / "no" / "x.png")


def test_an_image_given_as_a_source_names_its_folder(run: Path, tmp_path: Path) -> None:
    photos = write_pairs(tmp_path / "photos", 1)
    words = ["embed", "--model", run, "--out", tmp_path / "s.store", "--data"]
    for data in (photos / "000.jpg", photos / "*.jpg"):
        said = complaint(1, *words, data)
        assert (
            f"000.jpg: not a source: it is an image: give the folder that contains it, {photos}"
            in said
        )
    assert call(*words, photos).exit_code == 0


def test_a_pattern_that_became_many_words_is_no_page_of_names() -> None:
    names = [f"photos/{i:04d}.jpg" for i in range(2000)]
    said = complaint(2, "embed", "--model", "run", "--out", "s.store", "--data", *names)
    assert "put a pattern in quotes" in said
    assert len(said) < 500


def test_a_mistyped_option_of_search_is_not_taken_for_a_query(store: Path) -> None:
    said = complaint(2, "search", store, "red", "--wher", "true")
    assert "--where" in said
    assert "a query that begins with a dash" not in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--preset", "nanno"], "no preset is called 'nanno': did you mean 'nano'?"),
        (["--model", "vitb32"], "no open_clip model is called 'vitb32': did you mean 'ViT-B-32'?"),
        (["--model", "RN50", "--pretrained", "opnai"], "weights 'opnai': did you mean 'openai'?"),
        (["--pretrained", "openai"], "pretrained needs model"),
    ],
)
def test_a_model_that_nobody_knows_is_refused_before_the_sources_are_read(
    words: list[str], said: str, tmp_path: Path
) -> None:
    nowhere = tmp_path / "nowhere"
    result = call("train", "--data", nowhere, "--out", tmp_path / "run", *words)
    assert result.exit_code in (1, 2)
    assert said in result.stderr
    assert str(nowhere) not in result.stderr
