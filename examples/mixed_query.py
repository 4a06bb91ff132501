"""Search by several things at once: some to be near to, some to be far from.

python examples/mixed_query.py photos.store "a red dress + 0.5:@cat.jpg - 0.5:stripes"
"""

import sys

from mmalign import Query, Searcher


def main() -> None:
    """Print the ten nearest images."""
    store, text = sys.argv[1:]
    searcher = Searcher.open(store)
    query = Query.parse(text, fields=searcher.fields, files=True)
    print(f"read as: {query}")
    for hit in searcher.search(query):
        print(f"{hit.rank:>3}  {hit.score:.3f}  {hit.uri}")


if __name__ == "__main__":
    main()
