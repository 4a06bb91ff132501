"""Find rows that resemble the best answer to a text.

python examples/more_like_this.py photos.store "a dog on a beach"
"""

import sys

from mmalign import Row, Searcher


def main() -> None:
    """Search by words, then by what was found."""
    store, words = sys.argv[1:]
    searcher = Searcher.open(store)
    first = searcher.search(words, k=1)[0]
    print(f"{first.id}: {first.captions[0] if first.captions else first.uri}")
    for hit in searcher.search(Row(first.id), k=6)[1:]:
        print(f"  {hit.score:.3f}  {hit.id}")


if __name__ == "__main__":
    main()
