"""What a message proposes works: each command that it names exists, and mends what it says."""

import ast
import configparser
import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import small_store
from command import call, follow, proposed
from conftest import jpeg, write_pairs, write_tar

from mmalign.cli.main import main
from mmalign.store import manifest as manifests
from mmalign.training.train import TrainConfig

ROOT = Path(__file__).parents[2]
OPTIONS = {
    name: {o for p in c.params for o in (*p.opts, *p.secondary_opts)}
    for name, c in main.commands.items()
}


# ---------------------------------------------------------------- every message of the source


@cache
def nodes() -> list[tuple[str, list[ast.AST]]]:
    """The name of every file of the source, and all that stands in it."""
    files = [f for folder in ("mmalign", "index") for f in (ROOT / folder).rglob("*.py")]
    return [(f.name, list(ast.walk(ast.parse(f.read_text(encoding="utf-8"))))) for f in files]


@cache
def messages() -> list[tuple[str, str]]:
    """The file and text of every message, `{}` for what is filled in; no docstrings."""
    found = []
    for name, held in nodes():
        passed = {id(n.value) for n in held if isinstance(n, ast.Expr)}
        passed |= {id(p) for n in held if isinstance(n, ast.JoinedStr) for p in n.values}
        for node in held:
            if id(node) in passed:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "{}" for p in node.values)
                found.append((name, "".join(map(str, parts))))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append((name, node.value))
    return found


def commands_made() -> Iterator[list[str]]:
    """Yield the words of every call of `errors.shell_command`, `{}` for what is filled in."""
    for _, held in nodes():
        for node in held:
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "shell_command":
                yield [str(a.value) if isinstance(a, ast.Constant) else "{}" for a in node.args]


def test_commands_in_messages_exist_with_their_options() -> None:
    made = list(commands_made())
    assert len(made) >= 10
    for words in made:
        assert words[0] in OPTIONS, words
        assert {w for w in words if w.startswith("--")} <= OPTIONS[words[0]], words


def test_commands_are_whole_so_that_they_can_be_pasted() -> None:
    """`errors.shell_command` quotes the place; a command without its place is no remedy."""
    by_hand = [m for m in messages() if re.search(r"`mmalign (\w|[^`]*\{\})", m[1])]
    assert [(f, m) for f, m in by_hand if f != "errors.py"] == []


def test_options_in_messages_exist() -> None:
    ours = set().union(*OPTIONS.values())
    foreign = {"--help", "--version", "--force-reinstall", "--index-url"}
    named = {(f, o) for f, m in messages() for o in re.findall(r"(?<![\w-])--[a-z][a-z-]+", m)}
    assert len(named) > 20
    assert {(f, o) for f, o in named if o not in ours | foreign} == set()


def test_settings_in_messages_exist() -> None:
    fields = {f.name for f in dataclasses.fields(TrainConfig)}
    named = {k for _, m in messages() for k in re.findall(r"--set (\w+)=", m)}
    assert "batch_size" in named
    assert named <= fields | {"key"}


def test_extras_in_messages_exist() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = set(config["options.extras_require"])
    named = {e for _, m in messages() for e in re.findall(r"mmalign\[(\w+)\]", m)}
    assert "sql" in named
    assert named <= extras


# ---------------------------------------------------------------- followed


@pytest.fixture
def own_store(store: Path, tmp_path: Path) -> Path:
    """A copy of the store that a test may damage; its name needs quotes."""
    return Path(shutil.copytree(store, tmp_path / "my own.store"))


def test_a_place_that_is_no_store_is_made_one(run: Path, scenes: Path, tmp_path: Path) -> None:
    place = tmp_path / "new store"
    follow(call("search", place, "red"), RUN_OR_NAME=run, SRC=scenes)
    assert call("search", place, "red").exit_code == 0


@pytest.mark.parametrize("damage", ["cut", "gone", "flipped"])
def test_a_damaged_shard_is_repaired(damage: str, own_store: Path) -> None:
    shard = next((own_store / "shards").glob("*-rows.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    if damage == "flipped":
        # Only compaction reads every byte.
        call("delete", own_store, "scenes/000001")
        result = call("compact", own_store)
    else:
        result = call("search", own_store, "red")
    follow(result)
    assert call("verify", own_store).exit_code == 0
    assert call("compact", own_store).exit_code == 0


def test_a_damaged_generation_is_repaired(own_store: Path) -> None:
    call("delete", own_store, "scenes/000001")
    newest = max(own_store.glob("manifest-*.json"))
    newest.write_bytes(newest.read_bytes()[:-50])
    follow(call("info", own_store), code=0)
    assert call("info", own_store).stderr == ""
    newest = max(own_store.glob("manifest-*.json"))
    newest.write_bytes(newest.read_bytes()[:-50])
    follow(call("delete", own_store, "scenes/000002"))
    assert call("delete", own_store, "scenes/000002").exit_code == 0


def test_a_damaged_index_is_repaired(own_store: Path) -> None:
    assert call("index", own_store).exit_code == 0
    (file,) = own_store.glob("index/*/index.json")
    file.write_bytes(file.read_bytes()[:-9])
    follow(call("search", own_store, "red"), code=0)
    assert call("search", own_store, "red").stderr == ""


def test_damaged_lists_of_failures_are_repaired(tmp_path: Path) -> None:
    store = small_store.fill(tmp_path / "my store", [small_store.row(1)]).path
    (store / "failures.jsonl").write_text('{"id": "a", "uri"\n')
    follow(call("info", store), code=0)
    assert call("info", store).stderr == ""


def test_an_index_after_a_compaction_is_built_again(own_store: Path) -> None:
    assert call("index", own_store).exit_code == 0
    call("delete", own_store, "scenes/000001")
    compacted = call("compact", own_store)
    assert ["index", str(own_store)] in proposed(compacted.stderr)
    follow(compacted, code=0)
    assert '"index": {' in call("info", own_store, "--json").stdout


def test_a_store_without_rows_is_filled(own_store: Path, run: Path, scenes: Path) -> None:
    assert call("delete", own_store, "--where", "true", "--yes").exit_code == 0
    follow(call("index", own_store), RUN_OR_NAME=run, SRC=scenes)
    assert call("index", own_store).exit_code == 0


@pytest.mark.parametrize("command", ["search", "index"])
def test_a_model_that_moved_is_named(
    command: str, own_store: Path, run: Path, tmp_path: Path
) -> None:
    for file in own_store.glob("manifest-*.json"):
        held = manifests.read(file)
        moved = replace(held, model=replace(held.model, source="/gone/run"))
        file.write_bytes(manifests.render(moved))
    queries = tmp_path / "queries.txt"
    queries.write_text("a red circle\ntwo blue squares\n")
    rest = ["red"] if command == "search" else ["--queries", queries]
    refused = call(command, own_store, *rest)
    assert refused.exit_code == 1
    assert "give its folder or name with --model" in refused.stderr
    assert call(command, own_store, *rest, "--model", run).exit_code == 0


def test_more_than_a_tenth_of_the_rows_is_deleted_with_yes(own_store: Path) -> None:
    words = ["delete", own_store, "--where", "true"]
    refused = call(*words)
    assert refused.exit_code != 0
    assert "add --yes" in refused.stderr
    assert call(*words, "--yes").exit_code == 0


def test_what_a_compaction_keeps_for_an_hour_is_removed_now(own_store: Path) -> None:
    call("delete", own_store, "scenes/000001")
    before = {f.name for f in (own_store / "shards").iterdir()}
    compacted = call("compact", own_store)
    assert ["compact", str(own_store), "--now"] in proposed(compacted.stderr)
    assert before < {f.name for f in (own_store / "shards").iterdir()}
    assert call("compact", own_store, "--now").exit_code == 0
    assert before.isdisjoint(f.name for f in (own_store / "shards").iterdir())


def test_rows_whose_images_are_gone_are_dropped_with_yes(run: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", 4)
    words = ["embed", "--model", run, "--data", pairs, "--out", tmp_path / "s.store"]
    assert call(*words).exit_code == 0
    for name in ("000", "001"):
        (pairs / f"{name}.jpg").unlink()
    refused = call(*words, "--drop-removed")
    assert refused.exit_code == 1
    assert "2 of 4 rows would be deleted" in refused.stderr
    assert "add --yes" in refused.stderr
    done = call(*words, "--drop-removed", "--yes")
    assert (done.exit_code, "2 removed: 2 rows" in done.stderr) == (0, True)
    refused = call(*words, "--drop-removed", "--shard", "1/2")
    assert (refused.exit_code, "run it without --shard" in refused.stderr) == (2, True)


def test_captions_of_another_name_in_a_tar_are_read_by_the_key_that_is_named(
    run: Path, tmp_path: Path
) -> None:
    tar = write_tar(tmp_path / "t.tar", [("a.jpg", jpeg()), ("a.outputs.txt", b"a cat")])
    words = ["embed", "--model", run, "--data", tar, "--out", tmp_path / "s.store"]
    assert call(*words).exit_code == 0
    listed = (tmp_path / "s.store" / "failures.jsonl").read_text(encoding="utf-8")
    (key,) = re.findall(r"add --caption-key ([^\s\"]+)", listed)
    assert call(*words, "--caption-key", key).exit_code == 0
    assert json.loads(call("info", words[-1], "--json").stdout)["captions"] == 1


def test_captions_under_another_field_are_read_by_the_key_that_is_named(
    run: Path, tmp_path: Path
) -> None:
    pairs = write_pairs(tmp_path / "pairs", 2)
    for file in pairs.glob("*.json"):
        file.write_text('{"said": "a cat"}')
    words = ["evaluate", "--model", run, "--data", pairs]
    refused = call(*words)
    assert refused.exit_code == 1
    assert "fields said" in refused.stderr
    assert "see --caption-key" in refused.stderr
    assert call(*words, "--caption-key", "said").exit_code == 0


def test_images_in_another_column_are_read_by_the_name_that_is_listed(
    run: Path, tmp_path: Path
) -> None:
    write_pairs(tmp_path, 2)
    (tmp_path / "t.csv").write_text("scan,words\n000.jpg,a cat\n001.jpg,a dog\n")
    words = ["embed", "--model", run, "--data", tmp_path / "t.csv", "--out", tmp_path / "s.store"]
    refused = call(*words)
    assert refused.exit_code == 1
    assert "scan" in refused.stderr
    assert "see --image-column" in refused.stderr
    done = call(*words, "--image-column", "scan", "--caption-key", "words")
    assert (done.exit_code, "2 added" in done.stderr) == (0, True)


@pytest.mark.slow
def test_a_batch_that_is_too_large_is_made_smaller(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", 5)
    words = ["train", "--data", pairs, "--out", tmp_path / "run", "--set", "epochs=1"]
    refused = call(*words, "--set", "batch_size=64")
    (setting,) = re.findall(r"--set (batch_size=\d+)", refused.stderr)
    assert call(*words, "--set", setting).exit_code == 0


def test_a_sheet_of_another_kind_gets_the_name_that_is_proposed(
    store: Path, tmp_path: Path
) -> None:
    refused = call("search", store, "red", "--sheet", tmp_path / "hits.doc")
    assert refused.exit_code == 2
    (end,) = re.findall(r"a name that ends in (\.\w+)", refused.stderr)
    assert call("search", store, "red", "--sheet", tmp_path / f"hits{end}").exit_code == 0
    assert [p.name for p in tmp_path.iterdir()] == [f"hits{end}"]
