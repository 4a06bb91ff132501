"""The documentation is executed: its Python, its commands and options, its links and its tree."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mmalign
from mmalign import open_store
from mmalign.cli.main import main
from mmalign.store import ModelCard, delete
from mmalign.store.schema import ROW_SCHEMA, THUMBNAIL_SCHEMA, vector_schema

ROOT = Path(__file__).parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
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
    assert " ".join(shape) == "96 (1, 128)"
    assert float(norm) == pytest.approx(1, abs=1e-3)


def test_the_reader_of_the_format_page_leaves_deleted_rows_out(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(store, tmp_path / "photos.store")
    ids = open_store(store).column("id")
    delete(tmp_path / "photos.store", [ids[0], ids[40]])
    monkeypatch.chdir(tmp_path)
    exec(compile(reader_of_the_format_page(), "docs/format.md", "exec"), {})
    assert capsys.readouterr().out.startswith(f"{ids[1]} 94 (1, 128) ")


def test_every_column_is_described() -> None:
    table = FORMAT.split("### Shard columns")[1].split("Rows are numbered")[0]
    described = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    positions = tuple(ModelCard("", "", 8).positions.items())
    columns = (*ROW_SCHEMA.names, *vector_schema(8, positions).names, *THUMBNAIL_SCHEMA.names)
    assert described == list(columns)


def test_the_tree_of_the_contributors_page_is_the_tree() -> None:
    tree = CONTRIBUTING.split("## The tree")[1].split("```")[1]
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


def test_every_command_is_in_the_pages_and_every_option_in_a_help() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name, command in main.commands.items():
        assert f"mmalign {name}" in text or f"make {name}" in text, name
        assert "Example:" in (command.help or ""), name
        for option in command.params:
            assert getattr(option, "help", "x") or option.param_type_name == "argument", option.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_the_pages_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for line in "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S)).splitlines():
        words = line.split("#")[0].split()
        if words[:1] == ["mmalign"]:
            known = {o for p in main.commands[words[1]].params for o in p.opts}
            used = {word.split("=")[0] for word in words if word.startswith("--")}
            assert used <= known, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_in_the_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target.split("#")[0]).exists(), target


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "README.zh.md", "docs/python.md"])
def test_python_in_the_pages_runs(
    page: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a page, one after the other, over a store of drawn scenes."""
    shutil.copytree(store, tmp_path / "photos.store")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    assert blocks
    exec(compile("\n".join(blocks), page, "exec"), {})


@pytest.mark.slow
def test_the_reference_has_every_name(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "docs" / "api.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "Warn" not in done.stderr
    page = (tmp_path / "mmalign.html").read_text(encoding="utf-8")
    assert [name for name in mmalign.__all__ if f'id="{name}"' not in page] == []
