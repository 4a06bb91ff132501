"""What every row of a benchmark carries: the machine, the versions, the commit, the date."""

import csv
import datetime
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def machine() -> dict[str, str]:
    """Describe where and with what a row was measured."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x
        ]
        cpu = names[0] if names else cpu
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.strip()
    return {
        "cpu": cpu,
        "cores": str(os.cpu_count()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "open_clip": version("open_clip_torch"),
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


def append(name: str, row: dict[str, Any]) -> None:
    """Add a row to results/<name>.csv and show it."""
    path = ROOT / "bench" / "results" / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    whole = {**row, **machine()}
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(whole))
        if new:
            writer.writeheader()
        writer.writerow(whole)
    print("  ".join(f"{k}={v}" for k, v in row.items()), flush=True)
