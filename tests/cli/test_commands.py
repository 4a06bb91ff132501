"""The command line: what it says when a call is off, its exit codes, and what stands on stdout."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from command import answer, call, complaint

from mmalign.cli.main import main
from mmalign.model import new_model, save_model
from mmalign.store import manifest as manifests

COMMANDS = sorted(main.commands)


@pytest.fixture
def own_store(store: Path, tmp_path: Path) -> Path:
    """A copy of the store that a test may change."""
    return shutil.copytree(store, tmp_path / "own.store")


@pytest.fixture
def other_run(tmp_path: Path) -> Path:
    """A run folder of another model."""
    folder = tmp_path / "other"
    folder.mkdir()
    save_model(new_model("nano", ["a word", "two words"]), folder)
    return folder


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_of_the_command(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert f"Example:  mmalign {command}" in result.stdout


def test_help_names_every_command() -> None:
    """That it loads nothing heavy, and so takes no time, is in test_light.py."""
    words = [sys.executable, "-m", "mmalign", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert all(f"  {command} " in done.stdout for command in COMMANDS)


def test_version() -> None:
    import mmalign

    assert call("--version").stdout.split()[-1] == mmalign.__version__


# ---------------------------------------------------------------- usage: exit code 2


def test_unknown_command_and_option_name_the_nearest() -> None:
    assert "no command is called 'serch': did you mean 'search'?" in complaint(2, "serch", "x")
    assert "--dta" in (said := complaint(2, "embed", "--dta", "x"))
    assert "--data" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["search", "x.store"], "Missing argument 'QUERY'"),
        (["search", "x.store", "q", "-k", "many"], "'many' is not a valid integer"),
        (["embed", "--data", "x", "--out", "y"], "Missing option '--model'"),
        (["train", "--out", "y"], "no training data: give --data SRC"),
        (["index", "x.store", "--recall", "most"], "'most' is not a valid float"),
        (["index", "x.store", "--recall", "1.5"], "--recall 1.5 must be above 0 and at most 1"),
        (["index", "x.store", "--memory", "much"], "--memory much: write an amount such as 300MB"),
        (["index", "x.store", "--memory", "0GB"], "--memory 0GB must be above 0"),
        (["evaluate", "--model", "m", "--data", "d", "--classes", " , "], "contains no class name"),
    ],
)
def test_words_that_are_off(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in complaint(2, *words)
    assert not list(tmp_path.iterdir())


def test_a_training_without_data_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "no images found" in complaint(1, "train", "--data", "photos", "--out", "run")
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("epoch=3", "--set: unknown key 'epoch': did you mean 'epochs'?"),
        ("augment.flp=true", "augment: unknown key 'flp': did you mean 'flip'?"),
        ("epochs=many", "epochs: expected float, got 'many'"),
        ("batch_size=2.5", "batch_size: expected int, got 2.5"),
        ("loss=infonc", "unknown value 'infonc': did you mean 'infonce'?"),
        ("augment.aspect=0.0", "augment.aspect=0.0 must be at least 1"),
        ("augment.erase=2", "augment.erase=2.0 must be in [0, 1]"),
        ("epochs", "--set epochs: write it as key=value"),
    ],
)
def test_settings_that_are_off(tmp_path: Path, setting: str, said: str) -> None:
    out = tmp_path / "run"
    assert said in complaint(2, "train", "--data", tmp_path, "--out", out, "--set", setting)
    assert not out.exists()


def test_configuration_files_that_are_off(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    words = ("train", "--data", tmp_path, "--out", tmp_path / "run", "--config", file)
    assert f"{file}: no such configuration file" in complaint(2, *words)
    file.write_text("epochs = \n")
    assert f"{file}: not valid TOML" in complaint(2, *words)
    file.write_text("[augment]\ncolor = 0.1\n")
    said = complaint(2, *words)
    assert f"{file}: augment: unknown key 'color': did you mean 'colour'?" in said


def test_resume_without_a_state_and_a_run_that_exists(
    run: Path, scenes: Path, tmp_path: Path
) -> None:
    gone = tmp_path / "run"
    assert f"{gone}: nothing to resume" in complaint(
        2, "train", "--data", scenes, "--out", gone, "--resume"
    )
    before = {f: f.read_bytes() for f in run.iterdir() if f.is_file()}
    said = complaint(2, "train", "--data", scenes, "--out", run)
    assert f"{run}: already holds a run: continue it with --resume" in said
    assert {f: f.read_bytes() for f in run.iterdir() if f.is_file()} == before


@pytest.mark.parametrize(("query", "k"), [("", 5), ("  ", 5), ("red", 0), ("red", -1)])
def test_empty_queries_and_no_results(store: Path, query: str, k: int) -> None:
    wanted = f"k={k} must be at least 1" if k < 1 else "the query is empty"
    assert wanted in complaint(2, "search", store, query, "-k", str(k))


# ---------------------------------------------------------------- it cannot be done: exit code 1


def test_sources_that_are_none(run: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    words = ("embed", "--model", run, "--out", tmp_path / "s.store", "--data")
    said = complaint(1, *words, tmp_path / "fotos")
    assert "fotos: no such file or folder: did you mean 'photos'?" in said
    assert "no images found" in complaint(1, *words, tmp_path / "photos")
    assert "cannot be opened" in complaint(1, *words, "foo://bucket/x.tar")
    assert not (tmp_path / "s.store").exists()


@pytest.mark.parametrize("words", [["index"], ["info"], ["verify"], ["info", "--json"]])
def test_what_is_no_store(tmp_path: Path, words: list[str]) -> None:
    command, *rest = words
    for place, why in ((tmp_path, "is a folder without a manifest"), (tmp_path / "x", "not exist")):
        said = complaint(1, command, place, *rest)
        assert f"{place}: not a store" in said
        assert why in said
        assert "mmalign embed" in said
    assert list(tmp_path.iterdir()) == []


def test_two_models_do_not_meet(own_store: Path, run: Path, other_run: Path, scenes: Path) -> None:
    """Whoever searches with another model is told both names, before it is that of the store and
    after."""
    identity = answer("info", own_store)["model"]["identity"]

    def names_in(said: str) -> set[str]:
        return {w.strip(":;,.") for w in said.split() if w.startswith("nano-")}

    found = answer("search", own_store, "red", "--model", run)
    names = names_in(complaint(1, "search", own_store, "red", "--model", other_run))
    assert identity in names
    keys = ["--caption-key", "captions", "--caption-key", "captions_zh"]
    words = ["embed", "--model", other_run, "--data", scenes, "--out", own_store, *keys]
    report = answer(*words)
    assert (report["rebuilt"], report["present"]) == (96, 96)
    assert {identity, answer("info", own_store)["model"]["identity"]} == names
    assert answer("search", own_store, "red")["hits"] != found["hits"]
    assert names_in(complaint(1, "search", own_store, "red", "--model", run)) == names


def test_a_model_that_moved(own_store: Path, run: Path) -> None:
    for manifest in own_store.glob("manifest-*.json"):
        held = manifests.read(manifest)
        moved = replace(held, model=replace(held.model, source="/gone/run"))
        manifest.write_bytes(manifests.render(moved))
    said = complaint(1, "search", own_store, "red")
    assert "/gone/run" in said
    assert answer("info", own_store)["model"]["identity"] in said
    assert len(answer("search", own_store, "red", "-k", "3", "--model", run)["hits"]) == 3


def test_unknown_models_name_the_nearest(run: Path, scenes: Path, tmp_path: Path) -> None:
    words = ("train", "--data", scenes, "--out", tmp_path / "run")
    said = complaint(1, *words, "--preset", "nan")
    assert "no preset is called 'nan': did you mean 'nano'? (nano, small, tiny)" in said
    assert "'ViT-B-3': did you mean 'ViT-B-32" in complaint(1, *words, "--model", "ViT-B-3")
    said = complaint(1, *words, "--model", "RN50", "--pretrained", "opnai")
    assert "RN50 has no pretrained weights 'opnai'" in said
    assert "openai" in said
    said = complaint(1, "embed", "--model", "RN50", "--data", scenes, "--out", tmp_path / "s")
    assert "RN50:TAG with one of openai" in said
    said = complaint(1, "evaluate", "--model", tmp_path, "--data", scenes)
    assert f"{tmp_path}: not a run folder: model.json is missing" in said


def test_a_batch_larger_than_the_data_names_one_that_fits(scenes: Path, tmp_path: Path) -> None:
    words = ("train", "--data", scenes, "--out", tmp_path / "run", "--preset", "nano")
    said = complaint(1, *words, "--set", "batch_size=1000")
    assert "batch_size=1000 is larger than the 96 training samples" in said
    assert "batch_size=64" in said


def test_query_files_that_are_off(own_store: Path, tmp_path: Path) -> None:
    file = tmp_path / "q.txt"
    assert f"{file}: queries cannot be read" in complaint(1, "index", own_store, "--queries", file)
    file.write_text("only one\n\n")
    assert f"{file}: 1 queries" in complaint(1, "index", own_store, "--queries", file)
    assert answer("info", own_store)["index"] is None


def test_damage_is_named_and_exits_with_1(own_store: Path) -> None:
    assert "every file matches its hash" in call("verify", own_store).stdout
    assert answer("verify", own_store) == {"damaged": []}
    shard = next((own_store / "shards").glob("*-vectors.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    plain, as_json = call("verify", own_store), call("verify", own_store, "--json")
    assert plain.exit_code == as_json.exit_code == 1
    assert plain.stdout == f"{shard}: its content does not match its hash\n"
    assert json.loads(as_json.stdout) == {"damaged": [plain.stdout.strip()]}
    shard.unlink()
    assert f"{shard}: missing" in call("verify", own_store).stdout
    assert f"{shard}: shard is missing" in complaint(1, "search", own_store, "red")


def test_places_that_cannot_be_written(run: Path, scenes: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    said = complaint(1, "embed", "--model", run, "--data", scenes, "--out", file / "s.store")
    assert str(file) in said
    said = complaint(1, "train", "--data", scenes, "--out", file / "run")
    assert str(file) in said
    assert file.read_text() == "in the way"


def test_class_names_may_be_long_but_must_be_known(run: Path, scenes: Path) -> None:
    words = ("evaluate", "--model", run, "--data", scenes, "--classes")
    said = complaint(1, *words, ",".join(f"class {i}" for i in range(100)))
    assert "no sample has a field 'label': known: captions_zh" in said
    assert len(said) < 200


# ---------------------------------------------------------------- what stands on stdout


def test_search_prints_one_object(store: Path) -> None:
    found = answer("search", store, "a red circle", "-k", "4")
    assert set(found) == {"query", "read_as", "hits", "nothing_found", "index", "took_ms"}
    assert found["query"] == "a red circle"
    assert [h["rank"] for h in found["hits"]] == [1, 2, 3, 4]
    assert all({"id", "score", "uri", "captions"} <= set(h) for h in found["hits"])
    scores = [h["score"] for h in found["hits"]]
    assert scores == sorted(scores, reverse=True)


def test_index_and_info_print_one_object(own_store: Path) -> None:
    built = answer("index", own_store)
    held = answer("info", own_store)
    assert {"rows", "generation", "model", "dim", "failures", "index"} <= set(held)
    assert held["rows"] == 96
    assert held["index"] == built
    assert answer("verify", own_store) == {"damaged": []}


@pytest.mark.slow
def test_embed_train_and_evaluate_print_one_object(
    run: Path, scenes: Path, own_store: Path, tmp_path: Path
) -> None:
    words = ("embed", "--model", run, "--data", scenes, "--out", own_store)
    again = answer(*words, "--caption-key", "captions", "--caption-key", "captions_zh")
    assert (again["added"], again["present"], again["failed"], again["rows"]) == (0, 96, 0, 96)
    # Other captions are a change.
    again = answer(*words, "--caption-key", "captions_zh", "--precision", "float32")
    assert (again["added"], again["changed"], again["present"], again["rows"]) == (0, 96, 0, 96)
    assert again["precision"] == "float32"
    assert "write i/n with i from 1 to n" in complaint(2, *words, "--shard", "2of3")
    measured = answer("evaluate", "--model", run, "--data", scenes, "--caption-key", "captions_zh")
    assert (measured["images"], measured["skipped"]) == (96, 0)
    assert 0 <= measured["image_retrieval_recall@1"] <= measured["image_retrieval_recall@10"] <= 1
    settings = ("--preset", "nano", "--set", "epochs=1", "--set", "batch_size=32")
    row = answer("train", "--data", scenes, "--out", tmp_path / "run", *settings)
    assert row["step"] == 3


@pytest.mark.slow
def test_a_process_says_it_in_one_line_without_traceback(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mmalign", "info", str(tmp_path), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"mmalign: {tmp_path}: not a store")


def test_a_bug_keeps_its_traceback(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("mmalign.store.open_store", broken)
    with pytest.raises(KeyError, match="a bug"):
        call("info", store)
