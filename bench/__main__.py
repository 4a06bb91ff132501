"""Choose a benchmark by name and run it."""

import importlib
import sys

NAMES = (
    "arithmetic",
    "changes",
    "combine",
    "diversity",
    "duplicates",
    "embed",
    "engines",
    "feedback",
    "first",
    "index",
    "lexical",
    "loss",
    "nothing",
    "ranks",
    "relevance",
    "rows",
    "scale",
    "search",
    "standin",
    "store",
    "tokens",
    "topk",
    "train",
    "vectors",
)


def main() -> None:
    """Run the named benchmark; without a name, those that need no data of yours."""
    names = sys.argv[1:2] or ["arithmetic", "loss", "topk", "ranks"]
    if names[0] not in NAMES:
        sys.exit(f"no benchmark {names[0]!r}: {', '.join(NAMES)}")
    for name in names:
        importlib.import_module(f"bench.{name}").main(sys.argv[2:])


main()
