"""Search by several things at once: some to be near to, some to be far from.

python examples/mixed_query.py photos.store "a red dress" +0.5 cat.jpg -0.5 "stripes"
"""

import sys
from pathlib import Path
from typing import Any

from mmalign import Query, Searcher


def parsed(words: list[str]) -> tuple[tuple[Any, float], ...]:
    """Read items and the weights in front of them; a name of a file is an image."""
    items: list[tuple[Any, float]] = []
    weight = 1.0
    for word in words:
        if word[0] in "+-" and word[1:].replace(".", "").isdecimal():
            weight = float(word)
        else:
            items.append((Path(word) if Path(word).is_file() else word, weight))
            weight = 1.0
    return tuple(items)


def main() -> None:
    """Print the ten nearest images."""
    store, *words = sys.argv[1:]
    for hit in Searcher.open(store).search(Query(parsed(words))):
        print(f"{hit.rank:>3}  {hit.score:.3f}  {hit.uri}")


if __name__ == "__main__":
    main()
