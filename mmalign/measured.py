"""Timings measured once per kind of machine, kept in a cache folder and reused.

Which of several methods is the fastest depends on the processor, and a measurement on a busy
machine can be wrong. So each is measured once, and later processes reuse the figures. They affect
only speed, never results, and any of the files may be deleted.

The folder is $MMALIGN_CACHE ("off": nothing is kept), else mmalign's folder in the system's cache
folder. If it cannot be read or written, the figures last as long as the process.
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mmalign import __version__
from mmalign.files import require_regular, write_json

Figures = dict[str, float]
VARIABLE, OFF = "MMALIGN_CACHE", "off"
# Fields of /proc/cpuinfo that identify a kind of processor, on x86 and on ARM.
KIND = (
    "model name", "cpu family", "model", "stepping", "flags",
    "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features",
)  # fmt: skip

_known: dict[str, Figures] = {}
_lock = threading.RLock()


def measured(
    what: str,
    conditions: Mapping[str, str | int],
    ways: Sequence[str],
    measure: Callable[[], Figures],
) -> Figures:
    """Return the recorded figures of several methods; measure and record them if necessary.

    Args:
        what: What is measured, used in the file name: "encoding", "exact-search".
        conditions: Everything that the figures depend on besides the processor, its cores and the
            versions of torch and mmalign.
        ways: The methods compared; the figures have exactly these names.
        measure: Runs each method and returns a finite figure for each. Only one thread of a
            process measures at a time.
    """
    key = {**machine(), **{k: str(v) for k, v in conditions.items()}, "ways": ", ".join(ways)}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    name = f"{what}-{digest[:16]}.json"
    with _lock:
        if name in _known:
            return dict(_known[name])
        folder = cache_folder()
        figures = _read(folder / name, key) if folder else None
        if figures is None or set(figures) != set(ways):
            figures = measure()
            assert set(figures) == set(ways)
            if folder:
                _write(folder / name, {"key": key, "figures": figures})
        _known[name] = figures
        return dict(figures)


def cache_folder() -> Path | None:
    """Return the folder of the records; None if caching is off or no folder is known."""
    chosen = os.environ.get(VARIABLE, "")
    if chosen:
        return None if chosen == OFF else Path(chosen)
    return user_folder()


def user_folder() -> Path | None:
    """Return mmalign's folder in the system's cache folder; None if no home folder is known."""
    if sys.platform == "win32":
        return _inside("LOCALAPPDATA", "AppData/Local", "mmalign/Cache")
    if sys.platform == "darwin":
        return _inside("", "Library/Caches", "mmalign")
    return _inside("XDG_CACHE_HOME", ".cache", "mmalign")


@cache
def machine() -> dict[str, str]:
    """Return the kind of processor, the number of usable cores, and the versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "none"
    return {
        "processor": _processor(),
        "cores": str(cores),
        "torch": torch,
        "mmalign": __version__,
    }


def _processor() -> str:
    said: dict[str, str] = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() in KIND:
                said.setdefault(key.strip(), value.strip())
    name = said.get("model name") or platform.processor() or platform.machine()
    # Virtual machines hide names: one reports "AMD EPYC" for five generations.
    kind = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    return f"{name}, {platform.machine()}, {kind[:8]}"


def _inside(variable: str, usual: str, ours: str) -> Path | None:
    # According to the XDG specification, a relative path is ignored.
    given = os.environ.get(variable, "")
    if Path(given).is_absolute():
        return Path(given) / ours
    try:
        return Path.home() / usual / ours
    except RuntimeError:
        return None


def _read(path: Path, key: dict[str, str]) -> Figures | None:
    """Read the figures of a file; None if it has none for this key."""
    try:
        require_regular(path)
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("key") != key:
        return None
    figures = content.get("figures")
    if not isinstance(figures, dict):
        return None
    whole = all(isinstance(v, int | float) and math.isfinite(v) for v in figures.values())
    return {k: float(v) for k, v in figures.items()} if whole else None


def _write(path: Path, content: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
