"""A process to be killed: it writes to a store and says each thing that was acknowledged.

python crash_worker.py STORE write NAME    commits of a few rows, ids NAME-0, NAME-1, ...
python crash_worker.py STORE compact       compaction over and over
"""

import itertools
import sys
from pathlib import Path

from ledger import CARD, row

from mmalign.errors import StoreError
from mmalign.store import Writer, compact


def write(store: Path, name: str) -> None:
    """Commit one to five rows at a time; some replace a row of the commit before."""
    numbers = itertools.count()
    with Writer(store, CARD) as writer:
        for turn in itertools.count():
            ids = [f"{name}-{next(numbers)}" for _ in range(turn % 5 + 1)]
            for one in ids:
                writer.add(row(one, 1))
            if turn % 3 == 2:
                writer.add(row(f"{name}-0", turn))
            writer.commit()
            print(*ids, flush=True)


def compact_on(store: Path) -> None:
    """Compact for ever; to lose against another change is no failure."""
    while True:
        try:
            compact(store, rows_per_shard=40)
        except StoreError as error:
            if "run it again" not in str(error):
                raise


if __name__ == "__main__":
    place, what, *rest = sys.argv[1:]
    write(Path(place), rest[0]) if what == "write" else compact_on(Path(place))
