"""A command run to its end: how long it took, and the most memory its processes held. Linux."""

import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from bench import measure

LOOK_SECONDS = 0.25
# A new high of the plain sum by less than this is not looked into.
RISE = 1.01


def run(command: list[str], threads: int, private: bool = False) -> dict[str, float]:
    """Run a command with so many threads for torch; `process_s` and `peak_mib`.

    Memory that several processes share counts once. To tell costs the kernel 20 ms a gigabyte, so
    it is asked only when the sum with everything counted for each process reaches a new high. With
    `private`, pages of files do not count, which the system takes back when it needs them.
    The program ends with the command's last words if that fails.
    """
    count = str(threads)
    environment = os.environ | {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
    started, high, peak = time.monotonic(), 0, 0
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=measure.ROOT, env=environment, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        while process.poll() is None:
            plain = memory_bytes(process.pid, "status", "RssAnon:" if private else "VmRSS:")
            if private:
                peak = max(peak, plain)
            elif plain > RISE * high:
                high = plain
                peak = max(peak, memory_bytes(process.pid, "smaps_rollup", "Pss:"))
            time.sleep(LOOK_SECONDS)
        if process.returncode:
            log.seek(0)
            sys.exit(f"{log.read().decode()[-3000:]}\nfailed: {' '.join(command[:6])}")
    return {"process_s": time.monotonic() - started, "peak_mib": peak / 2**20}


def memory_bytes(session: int, file: str, field: str) -> int:
    """Sum a number that the system tells of each process of a session."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        # A process may end in between, or be about to: then it has no memory to tell of.
        with suppress(OSError, StopIteration):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                lines = (folder / file).read_text().splitlines()
                total += 1024 * int(next(x for x in lines if x.startswith(field)).split()[1])
    return total
