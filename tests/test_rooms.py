"""Each room imports only rooms below it, and each foreign library has one door."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {"mmalign": ROOT / "mmalign", "mmalign.index": ROOT / "index"}

# Lowest first: a room imports rooms of earlier lines; those of one line do not know each other.
ORDER: list[set[str]] = [
    {"mmalign.arrays", "mmalign.errors", "mmalign.terminal", "mmalign.values", "mmalign.memory"},
    {
        "mmalign.arrow_values",
        "mmalign.config",
        "mmalign.files",
        "mmalign.progress",
    },
    {"mmalign.locks", "mmalign.measured", "mmalign.modality"},
    {"mmalign.items"},
    {"mmalign.kernels"},
    {"mmalign.model", "mmalign.data", "mmalign.store", "mmalign.index"},
    {"mmalign.encoding"},
    {"mmalign.evaluation"},
    {"mmalign.training", "mmalign.embedding", "mmalign.search", "mmalign.exchange"},
    {"mmalign.cli"},
]
DOORS = {
    "faiss": {"mmalign.index.approximate"},
    "open_clip": {"mmalign.model.clip_networks"},
    "huggingface_hub": {"mmalign.model.clip_networks"},
    "timm": set(),
    "triton": {"mmalign.kernels.triton_loss", "mmalign.kernels.triton_topk"},
    "tokenizers": {"mmalign.model.tokenizer"},
    "safetensors": {"mmalign.model.checkpoint", "mmalign.model.weights"},
    "pyarrow": {
        "mmalign.store",
        "mmalign.exchange",
        "mmalign.arrow_values",
        "mmalign.data.arrow_tables",
    },
    "webdataset": {"mmalign.data.scenes"},
    "braceexpand": {"mmalign.data.catalog"},
    "fsspec": {"mmalign.data"},
    "click": {"mmalign.cli"},
    "duckdb": {"mmalign.store.where"},
    "tqdm": {"mmalign.progress"},
    "wcwidth": {"mmalign.terminal"},
    "pillow_heif": {"mmalign.data.decode"},
    "PIL": {"mmalign.data", "mmalign.search.sheet"},
}
NO_TORCH = (
    "mmalign.store",
    "mmalign.data.catalog",
    "mmalign.measured",
    "mmalign.evaluation.metrics",
    "mmalign.cli",
)


@cache
def modules() -> dict[str, set[str]]:
    """Every module of the package by its import name, and what it imports."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in folder.rglob("*.py"):
            parts = [p for p in file.relative_to(folder).with_suffix("").parts if p != "__init__"]
            found[".".join([package, *parts])] = imports(file.read_text(encoding="utf-8"))
    return found


def imports(source: str) -> set[str]:
    """Full names of what a module imports, at any depth; type-checking blocks are left out."""
    names: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write the full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        waiting += (n for n in ast.iter_child_nodes(node) if not isinstance(n, ast.expr))
    return names


def inside(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def place(name: str) -> tuple[int, str] | None:
    """Line and room of a module of ours."""
    hits = [(i, r) for i, line in enumerate(ORDER) for r in line if inside(name, r)]
    return max(hits, key=lambda hit: len(hit[1])) if hits else None


def wrong_rooms(found: dict[str, set[str]]) -> list[str]:
    wrong = []
    for name, imported in found.items():
        here = place(name)
        for other in imported:
            there = place(other)
            if here and there and here[1] != there[1] and there[0] >= here[0]:
                wrong.append(f"{name} imports {other}")
    return wrong


def wrong_doors(found: dict[str, set[str]]) -> list[str]:
    return [
        f"{name} imports {library}"
        for name, imported in found.items()
        for library, doors in DOORS.items()
        if any(inside(other, library) for other in imported)
        and not any(inside(name, door) for door in doors)
    ]


def test_every_module_has_a_room() -> None:
    free = {"mmalign", "mmalign.__main__"}
    assert [n for n in modules() if n not in free and place(n) is None] == []


def test_rooms_look_down_only() -> None:
    assert wrong_rooms(modules()) == []


def test_one_door_per_foreign_library() -> None:
    assert wrong_doors(modules()) == []


def test_storage_and_faces_know_no_torch() -> None:
    wrong = [
        name
        for name, imported in modules().items()
        if any(inside(name, room) for room in NO_TORCH)
        and any(inside(other, "torch") for other in imported)
    ]
    assert wrong == []


def test_the_checks_can_fail() -> None:
    upward = {"mmalign.files": imports("from mmalign.cli import main")}
    sideways = {"mmalign.store.reader": imports("import mmalign.model")}
    foreign = {"mmalign.search.searcher": imports("def f():\n    with a:\n        import faiss")}
    assert wrong_rooms(upward) == ["mmalign.files imports mmalign.cli.main"]
    assert wrong_rooms(sideways) == ["mmalign.store.reader imports mmalign.model"]
    assert wrong_doors(foreign) == ["mmalign.search.searcher imports faiss"]
    assert imports("if TYPE_CHECKING:\n    import torch\nelse:\n    import numpy") == {"numpy"}
    assert imports("try:\n    import a\nexcept E:\n    import b") == {"a", "b"}
    assert imports("match x:\n    case 1:\n        import a") == {"a"}
