"""Importing the package is light, and changes nothing in the process of a program that does."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

HEAVY = "{'torch','faiss','open_clip','triton','numpy','pyarrow','webdataset','PIL'}"


def loaded_by(code: str) -> str:
    probe = f"import sys\n{code}\nprint(sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def test_import_is_light() -> None:
    assert loaded_by("import mmalign, mmalign.cli.main") == "[]"


def test_help_is_light() -> None:
    code = "from mmalign.cli.main import main\ntry: main(['train', '--help'])\nexcept SystemExit: 0"
    assert loaded_by(code) == "[]"


def test_imports_of_commands_are_left_out_of_collections() -> None:
    code = """
import gc
from mmalign.cli.startup import quick_imports
try:
    with quick_imports():
        was_on = gc.isenabled()
        import no_such_module
except ImportError:
    print(was_on, gc.isenabled(), gc.get_freeze_count())
with quick_imports():
    import torch
frozen = gc.get_freeze_count()
print(gc.isenabled(), frozen > 100_000)
with quick_imports():
    print(gc.isenabled())
print(gc.get_freeze_count() == frozen)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "0", "True", "True", "True", "True"]


def test_the_probe_can_fail() -> None:
    assert loaded_by("import numpy") == "['numpy']"


def test_every_public_name_resolves() -> None:
    import mmalign

    for name in mmalign.__all__:
        assert getattr(mmalign, name) is not None


def test_a_library_is_quiet_but_for_warnings() -> None:
    code = (
        "from mmalign import progress\n"
        "progress.say('a word'); progress.say('warning: a loss')\n"
        "print(list(progress.over('scan', range(3))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[0, 1, 2]\n", "warning: a loss\n")


# What other libraries change when they are imported is theirs, so they are there already.
SIDE_EFFECTS = """
import importlib, logging, os, pkgutil, random, signal, sys, warnings
import click, faiss, numpy, pyarrow, PIL.Image, tokenizers, torch, torch.nn.functional, tqdm
import torch.overrides, safetensors.torch

def state():
    return {
        "warnings": list(warnings.filters),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(numpy.random.get_state()),
        "random": random.getstate(),
        "float": (torch.get_default_dtype(), torch.get_float32_matmul_precision()),
        "logging": (logging.root.level, logging.root.handlers[:], logging.raiseExceptions),
        "ours": repr(logging.getLogger("mmalign").__dict__),
        "signals": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)],
        "hooks": (sys.excepthook, sys.stdout.errors, sys.stderr.errors),
        "environment": dict(os.environ),
        "pillow": (PIL.Image.MAX_IMAGE_PIXELS, sorted(PIL.Image.EXTENSION)),
    }

before = state()
import mmalign, mmalign.index
for package in (mmalign, mmalign.index):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
after = state()
print("changed", [name for name in before if before[name] != after[name]])
"""


@pytest.mark.slow
def test_importing_every_module_changes_nothing() -> None:
    command = [sys.executable, "-c", SIDE_EFFECTS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "changed []"


def calls_for_effect(tree: ast.Module) -> list[str]:
    """Statements of a module that only call something: whatever they do, they do on import."""
    return [
        ast.unparse(node)
        for node in tree.body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ]


def test_no_module_calls_anything_for_its_effect() -> None:
    files = [*(ROOT / "mmalign").rglob("*.py"), *(ROOT / "index").rglob("*.py")]
    wrong = {f.name: calls_for_effect(ast.parse(f.read_text(encoding="utf-8"))) for f in files}
    assert {name: calls for name, calls in wrong.items() if calls} == {"__main__.py": ["main()"]}
    assert calls_for_effect(ast.parse("import os\nos.umask(0)")) == ["os.umask(0)"]
