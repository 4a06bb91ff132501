"""The package list, doctests, and the ceilings that keep files and functions readable."""

import ast
import configparser
import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mmalign
import mmalign.index

from floors import requirements  # isort: skip

ROOT = Path(__file__).parents[1]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 600, 90
DRAWERS = {"utils.py", "helpers.py", "misc.py", "common.py"}


def test_setup_cfg_lists_every_package() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    folders = {p.parent.relative_to(ROOT) for p in (ROOT / "mmalign").rglob("__init__.py")}
    assert listed == {".".join(f.parts) for f in folders} | {"mmalign.index"}


def test_what_is_tested_together_is_what_setup_cfg_allows() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name, equals, version = line.partition("==")
        if equals:
            pins[canonicalize_name(name)] = version
    for requirement in map(Requirement, requirements()):
        assert any(s.operator == ">=" for s in requirement.specifier), requirement
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def module_names() -> list[str]:
    ours = pkgutil.walk_packages(mmalign.__path__, "mmalign.")
    index = pkgutil.iter_modules(mmalign.index.__path__, "mmalign.index.")
    return sorted({m.name for m in [*ours, *index]} - {"mmalign.__main__"})


@pytest.mark.parametrize("name", ["mmalign", *module_names()])
def test_doctests(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def source_files() -> list[Path]:
    return [p for folder in ("mmalign", "index", "bench") for p in (ROOT / folder).rglob("*.py")]


def test_no_file_or_function_outgrows_a_reader() -> None:
    wrong = [f"{p.name}: a drawer, not a room" for p in source_files() if p.name in DRAWERS]
    for path in source_files():
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > MAX_FILE_LINES:
            wrong.append(f"{path.name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                size = (node.end_lineno or 0) - node.lineno + 1
                if size > MAX_FUNCTION_LINES:
                    wrong.append(f"{path.name}: {node.name} has {size} lines")
    assert wrong == []
