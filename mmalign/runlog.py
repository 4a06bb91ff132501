"""How a training goes: a line of metrics.jsonl and a TensorBoard event for every number."""

from pathlib import Path
from typing import Any

from mmalign import files


class RunLog:
    """Where a run writes how it goes; final."""

    def __init__(self, run: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.file = run / "metrics.jsonl"
        self.events = SummaryWriter(str(run / "events"))

    def write(self, row: dict[str, Any]) -> None:
        """Log the numbers of one moment, `step` among them."""
        files.append_lines(self.file, [row])
        for name, value in row.items():
            self.events.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Flush what is not written yet."""
        self.events.close()
