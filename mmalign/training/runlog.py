"""Log the progress of a training to metrics.jsonl and as TensorBoard events."""

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from mmalign import files

METRICS = "metrics.jsonl"


class RunLog:
    """The log of a run."""

    def __init__(self, run: Path, step: int = 0) -> None:
        """Continue at a step: entries beyond it, logged by a killed training, are removed."""
        self.file = run / METRICS
        if self.file.exists():
            files.rewrite(self.file, lambda content: _rows_until(content, step))
        self.events = _Events(run / "events", step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Log the numbers of one moment, including `step`.

        Raises:
            OSError: They cannot be written.
        """
        files.append_lines(self.file, [row])
        self.events.write(row["step"], row)

    def close(self) -> None:
        """Close the files."""
        self.events.close()


class _Events:
    """A file of TensorBoard events.

    TensorBoard's own writer has a thread that prints a traceback on a full disk, and the caller
    learns of it only later, without the file name.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        """Start a file; events of earlier files at or beyond `purge_step` no longer count."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        folder.mkdir(exist_ok=True)
        # TensorBoard recognizes its files by the prefix of the name, and reads them in order.
        now, host_and_pid = int(time.time()), f"{socket.gethostname()}.{os.getpid()}"
        self.path = folder / f"events.out.tfevents.{now:010d}.{host_and_pid}.{time.monotonic_ns()}"
        self.file = open(self.path, "xb")  # noqa: SIM115
        start = SessionLog(status=SessionLog.START)
        try:
            self._add(Event(wall_time=now, file_version="brain.Event:2"))
            self._add(Event(wall_time=now, step=purge_step, session_log=start))
        except OSError:
            self.close()
            raise

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Add one event for all numbers of a step."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items()]
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # already reported by `write`
            self.file.close()

    def _add(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        try:
            RecordWriter(self.file).write(event.SerializeToString())
            self.file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def _rows_until(content: bytes, step: int) -> bytes:
    kept = []
    for line in content.splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):  # incomplete line: the process was killed
            continue
    return b"".join(kept)
