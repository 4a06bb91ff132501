"""How a training goes: a line of metrics.jsonl and a TensorBoard event for every number."""

import json
from pathlib import Path
from typing import Any

from mmalign import files

METRICS = "metrics.jsonl"


class RunLog:
    """Where a run writes how it goes; final."""

    def __init__(self, run: Path, step: int = 0) -> None:
        """Go on at a step: what a training that was killed logged beyond it is taken back."""
        from torch.utils.tensorboard import SummaryWriter

        self.file = run / METRICS
        if self.file.exists():
            files.rewrite(self.file, lambda content: _until(content, step))
        self.events = SummaryWriter(str(run / "events"), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Log the numbers of one moment, `step` among them."""
        files.append_lines(self.file, [row])
        for name, value in row.items():
            self.events.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Flush what is not written yet."""
        self.events.close()


def _until(content: bytes, step: int) -> bytes:
    kept = []
    for line in content.splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):  # torn by a kill
            continue
    return b"".join(kept)
