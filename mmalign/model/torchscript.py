"""Weights from a TorchScript archive, as OpenAI ships its CLIP models; none of its code is run.

Such a file holds a program beside the weights. `torch.jit.load` would load both, and is deprecated.
Here the archive is read as data: classes become empty records, tensors are views of its bytes, and
any other name that it refers to is rejected.
"""

import ast
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.errors import ModelError

DTYPES = {
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
}
# Appears in the programs of networks with GELU; OpenAI's spell out QuickGELU step by step.
GELU = "torch.gelu("


def is_archive(file: Path) -> bool:
    """Return whether a file is a TorchScript archive."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any("/code/" in name for name in archive.namelist())


def read_archive(file: Path) -> tuple[dict[str, Tensor], bool]:
    """Return the weights by name, and whether the network computes QuickGELU.

    Raises:
        ModelError: It holds anything but modules and tensors, or is damaged.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            (data,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            root = data.removesuffix("data.pkl")
            sources = {
                name.removeprefix(root + "code/"): archive.read(name).decode()
                for name in archive.namelist()
                if name.startswith(root + "code/") and name.endswith(".py")
            }
            network = _Reader(archive, root).load()
        weights = dict(_weights(network, _declared(sources), ""))
    except (zipfile.BadZipFile, pickle.UnpicklingError, ValueError, KeyError, EOFError) as error:
        raise ModelError(f"{file}: the TorchScript archive cannot be read: {error}") from None
    return weights, not any(GELU in text for text in sources.values())


class _Module:
    """Placeholder for a module of the archive: its attributes and class name."""

    qualified = ""


class _Reader(pickle.Unpickler):
    """Read modules and tensors; any other name is rejected, so nothing can be called."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(root + "data.pkl")))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return type("_Module", (_Module,), {"qualified": f"{module}.{name}"})
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch.jit._pickle":
            return _plain
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, _ = pid
        content = bytearray(self.archive.read(f"{self.root}data/{key}"))
        return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)


def _tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _plain(value: Any = None, *_: Any) -> Any:
    """Return a list or number of the archive, whatever its declared type."""
    return value


def _declared(sources: dict[str, str]) -> dict[str, set[str]]:
    """Return the weight names of each class; its other tensors are constants of the program."""
    declared: dict[str, set[str]] = {}
    for path, text in sources.items():
        module = path.removesuffix(".py").replace("/", ".")
        for kind in ast.parse(text).body:
            if isinstance(kind, ast.ClassDef):
                declared[f"{module}.{kind.name}"] = {
                    str(ast.literal_eval(name))
                    for line in kind.body
                    if isinstance(line, ast.Assign) and isinstance(line.value, ast.List)
                    for name in line.value.elts
                    if ast.unparse(line.targets[0]) in ("__parameters__", "__buffers__")
                }
    return declared


def _weights(
    module: _Module, declared: dict[str, set[str]], prefix: str
) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []
    for name, value in vars(module).items():
        if isinstance(value, _Module):
            found += _weights(value, declared, f"{prefix}{name}.")
        elif isinstance(value, Tensor) and name in declared[module.qualified]:
            found.append((prefix + name, value))
    return found
