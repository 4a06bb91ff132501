"""Weight files written by other programs: what a file is, and why it cannot be loaded.

Only tensors are read. A file that holds other Python objects is rejected, never unpickled.
"""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmalign import files
from mmalign.errors import ModelError, reason_of

# First bytes of files often found in place of weights.
OTHERS = {
    b"version https://git-lfs": "a Git LFS pointer, not weights: run `git lfs pull` there",
    b"<": "a web page, not weights",
    b"\xff\xd8": "a JPEG image, not weights",
    b"\x89PNG": "a PNG image, not weights",
    b"RIFF": "an image or sound, not weights",
    b"GIF8": "a GIF image, not weights",
    b"%PDF": "a PDF, not weights",
    b"\x1f\x8b": "compressed: unpack it first",
    b"{": "JSON, not weights",
}
ZIP, PICKLE = b"PK\x03\x04", b"\x80"
TORCH_ENDINGS = (".pt", ".pth", ".bin", ".ckpt")
# Maximum number of mismatched weight names shown, and of characters of a library's message.
TOLD, LONGEST = 3, 300


def require_weights(file: Path) -> None:
    """Check the first bytes of a file.

    Raises:
        ModelError: It is not a weight file; the message says what it is.
    """
    with open(file, "rb") as content:
        head = content.read(64)
    if not head:
        raise ModelError(f"{file}: is empty")
    # A safetensors file begins with the length of its JSON, so its first byte can be anything.
    is_safetensors = head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32
    if file.suffix == ".safetensors":
        if not is_safetensors:
            what = next((w for start, w in OTHERS.items() if head.startswith(start)), "damaged")
            raise ModelError(f"{file}: not a safetensors file: {what}")
        return
    if is_safetensors:
        raise ModelError(
            f"{file}: a safetensors file: rename it so that its name ends in .safetensors"
        )
    what = next((w for start, w in OTHERS.items() if head.startswith(start)), "")
    if not what and file.suffix in TORCH_ENDINGS and not head.startswith((ZIP, PICKLE)):
        what = "not a file written by torch.save"
    if what:
        raise ModelError(f"{file}: {what}")


def refuse(where: str, error: Exception) -> NoReturn:
    """Raise an error that explains in one line why weights cannot be loaded.

    Raises:
        ModelError: Always.
    """
    raise ModelError(f"{where} cannot be loaded: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Shorten a library's message to what a user needs."""
    text = str(error).strip() or type(error).__name__
    if "weights_only" in text or "Weights only" in text:
        return "it contains other Python objects than weights: save only its state_dict() to a file"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines[0].startswith("Error(s) in loading state_dict"):
        return _misfit(lines[1:])
    return reason_of(error)[:LONGEST]


def _misfit(lines: list[str]) -> str:
    """Name the first weights of each kind that torch lists: missing, unknown, wrong shape."""
    told = []
    shapes = [line for line in lines if line.startswith("size mismatch for ")]
    for start, what in (("Missing key(s)", "missing"), ("Unexpected key(s)", "not in this model")):
        names = [n for line in lines if line.startswith(start) for n in re.findall('"(.+?)"', line)]
        if names:
            told.append(f"{what}: {', '.join(names[:TOLD])}{_more(names)}")
    if shapes:
        names = [line.removeprefix("size mismatch for ").partition(":")[0] for line in shapes]
        sizes = re.findall(r"torch\.Size\((\[.*?\])\)", shapes[0])
        given, wanted = [*sizes, "?", "?"][:2]
        first = f"{names[0]} is {given}, but the model has {wanted}"
        told.append(f"different shape: {first}{_more(names, 1)}")
    return "; ".join(told) or "the weights do not fit"


def _more(names: list[str], told: int = TOLD) -> str:
    return f" and {len(names) - told} more" if len(names) > told else ""


def require_numbers(weights: Mapping[str, Tensor], where: str) -> None:
    """Reject weights that are not finite numbers, before anything is computed with them.

    Raises:
        ModelError: A weight is NaN or infinite, or was not in the file.
    """
    for name, weight in weights.items():
        # A sum is read once and stores nothing; it is finite only if every number is.
        if not weight.is_floating_point() or weight.detach().sum().isfinite():
            continue
        if not weight.isfinite().all():
            raise ModelError(
                f"{where}: the weights contain NaN or infinity, first in {name}: the file is "
                "damaged, or its training diverged"
            )


def mapped(file: Path) -> dict[str, Tensor] | None:
    """Return the weights of a file as views of its content; None if it is not a plain one.

    Weights that are stored in another precision are copies in float32.

    Raises:
        RuntimeError: It is damaged, as other errors of torch and safetensors.
    """
    if file.suffix == ".safetensors":
        found: Any = load_file(files.utf8_name(file))
    elif zipfile.is_zipfile(file):
        found = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        found = found.get("state_dict", found) if isinstance(found, dict) else None
    else:
        return None
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        return None
    plain = {k: v.float() if v.is_floating_point() else v for k, v in found.items()}
    if next(iter(plain), "").startswith("module."):
        plain = {k.removeprefix("module."): v for k, v in plain.items()}
    return plain
