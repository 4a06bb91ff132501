"""A process that encodes work items with the stub: files of JSON in, files of JSON out.

python encode_worker.py STORE ITEM...    each ITEM.json becomes ITEM.receipts, a line for each
"""

import sys
from pathlib import Path
from typing import Any

from stub_encoder import StubEncoder

from mmalign.embedding.stored import StoredRows
from mmalign.embedding.work import WorkItem, encode
from mmalign.encoding.modalities import model_card
from mmalign.store import open_or_new


def main(store: str, *names: str) -> None:
    encoder: Any = StubEncoder()
    stored = StoredRows(open_or_new(store, model_card(encoder)))
    for name in names:
        item = WorkItem.from_json(Path(name).read_bytes())
        receipts = encode([item], stored, encoder, precision="float32")
        lines = "".join(receipt.to_json() + "\n" for receipt in receipts)
        Path(name).with_suffix(".receipts").write_text(lines)


if __name__ == "__main__":
    main(*sys.argv[1:])
