"""A process to be killed: it changes a store and says each thing that was acknowledged.

python crash_worker.py STORE write NAME     the steps of `steps(NAME)`, a line after each
python crash_worker.py STORE compact        compaction over and over
python crash_worker.py STORE embed RUN SRC HOW
                                            a process for each line it reads, by HOW (fork or
                                            spawn); it says who embeds, and each commit's ids; these
                                            processes are what is to be killed
"""

import importlib
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from ledger import CARD, Rows, row

from mmalign.errors import StoreError
from mmalign.store import Committer, Receipt, Writer, compact, delete
from mmalign.store.manifest import Manifest
from mmalign.store.shards import ShardReader


def steps(name: str) -> Iterator[tuple[Rows, list[str]]]:
    """Yield rows to commit, or ids to delete: new ids, replaced ones, and some of them go again."""
    for turn in count():
        fresh = {f"{name}-{turn}-{i}": 1 for i in range(turn % 5 + 1)}
        again = {f"{name}-0-0": turn} if turn % 3 == 2 else {}
        yield {**fresh, **again}, []
        if turn % 4 == 3:
            yield {}, list(fresh)[1:]


def write(store: Path, name: str) -> None:
    """Take one step after the other."""
    with Writer(store, CARD) as writer:
        for number, (rows, gone) in enumerate(steps(name), 1):
            for one, version in rows.items():
                writer.add(row(one, version))
            # Another one writes it too; the last one wins.
            writer.add(row("everybody's", number))
            writer.commit()
            if gone:
                delete(store, gone)
            print(number, flush=True)


def compact_on(store: Path) -> None:
    """Compact for ever; to lose against another change is no failure."""
    while True:
        try:
            compact(store, rows_per_shard=40)
        except StoreError as error:
            if "run it again" not in str(error):
                raise


def embed_in_processes(store: Path, run: str, source: str, how: str) -> None:
    """Embed in a new process for each line of stdin; what is imported once serves all forks."""
    importlib.import_module("mmalign.embedding.embed")
    context: Any = multiprocessing.get_context(how)
    for line in sys.stdin:
        process = context.Process(target=embed_in_one, args=(store / line.strip(), run, source))
        process.start()
        process.join()
        print("ended", abs(process.exitcode), flush=True)


def embed_in_one(store: Path, run: str, source: str) -> None:
    """Embed, and say what was committed."""
    from mmalign.embedding import embed, work

    work.COMMIT_SECONDS = 0.0
    commit = Committer.commit

    def said(committer: Committer, receipts: Sequence[Receipt]) -> Manifest:
        after = commit(committer, receipts)
        shards = (shard for receipt in receipts for shard in receipt.shards)
        readers = (ShardReader(committer.store, shard, committer.model) for shard in shards)
        print("has", *(i for reader in readers for i in reader.ids()), flush=True)
        return after

    Committer.commit = said  # type: ignore[method-assign]
    print("pid", os.getpid(), flush=True)
    embed.embed(run, [source], store, precision="float32")


if __name__ == "__main__":
    place, what, *rest = sys.argv[1:]
    {"write": write, "compact": compact_on, "embed": embed_in_processes}[what](Path(place), *rest)
