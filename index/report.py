"""A readable table of what was tried and what was chosen."""

from collections.abc import Sequence
from typing import Any

HEAD = ("design", "rows", "queries", "recall", "+-", "p50 ms", "p99 ms", "QPS", "bytes", "build s")


def table(trials: Sequence[dict[str, Any]]) -> str:
    """Format the trials of index.json; +- is half the width of the 95 % confidence interval."""
    rows = [HEAD, *(_cells(trial) for trial in trials)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    lines = []
    for row in rows:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([row[0].ljust(len(first)), *rest]))
    return "\n".join(lines)


def _cells(trial: dict[str, Any]) -> tuple[str, ...]:
    return (
        trial["design"],
        f"{trial['rows']:,}",
        trial["asked"],
        f"@{trial['point']['k']} {trial['recall']:.3f}",
        f"{(trial['high'] - trial['low']) / 2:.3f}",
        f"{trial['p50_ms']:.2f}",
        f"{trial['p99_ms']:.2f}",
        f"{trial['qps']:,.0f}",
        f"{trial['bytes_per_vector']:.0f}",
        f"{trial['build_s']:.0f}",
    )
