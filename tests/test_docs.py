"""The documentation is executed: the reader of docs/format.md, README's tree and commands."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mmalign import open_store
from mmalign.cli.main import main
from mmalign.store import delete
from mmalign.store.schema import schema

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FORMAT = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")


def reader_of_the_format_page() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", FORMAT, re.S)
    return str(code)


@pytest.mark.slow
def test_the_format_page_can_be_followed(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos.store").symlink_to(store)
    monkeypatch.chdir(tmp_path)
    exec(compile(reader_of_the_format_page(), "docs/format.md", "exec"), {})
    key, *shape, norm = capsys.readouterr().out.split()
    assert key == "scenes/000000"
    assert " ".join(shape) == "(96, 128)"
    assert float(norm) == pytest.approx(1, abs=1e-3)


def test_the_reader_of_the_format_page_leaves_deleted_rows_out(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(store, tmp_path / "photos.store")
    ids = open_store(store).column("id")
    delete(tmp_path / "photos.store", [ids[0], ids[40]])
    monkeypatch.chdir(tmp_path)
    exec(compile(reader_of_the_format_page(), "docs/format.md", "exec"), {})
    assert capsys.readouterr().out.startswith(f"{ids[1]} (94, 128) ")


def test_every_column_is_described() -> None:
    table = FORMAT.split("### Shard columns")[1].split("Rows are numbered")[0]
    described = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    assert described == schema(8).names


def test_the_tree_of_the_readme_is_the_tree() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    shown, folder = set(), ""
    for line in tree.strip().splitlines():
        name = line.strip().split()[0]
        if name.endswith("/") and not line.startswith(" "):
            folder = name
        else:
            shown.add(folder + name if line.startswith(" ") else name)
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    wanted = {f for f in listed if f.startswith(("mmalign/", "index/", "bench/")) and ".py" in f}
    wanted = {f for f in wanted if not f.endswith(("__init__.py", "__main__.py", "py.typed"))}
    code = {s for s in shown if s.startswith(("mmalign/", "index/", "bench/"))}
    assert code == wanted


def test_every_command_is_in_the_readme_and_every_option_in_a_help() -> None:
    for name, command in main.commands.items():
        assert f"mmalign {name}" in README, name
        assert "Example:" in (command.help or ""), name
        for option in command.params:
            assert getattr(option, "help", "x") or option.param_type_name == "argument", option.name


def test_readme_options_exist() -> None:
    known = {o for c in main.commands.values() for p in c.params for o in p.opts}
    block = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S))
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", block))
    assert used - known - {"--index-url", "--version"} == set()
