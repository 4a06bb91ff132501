"""Choose a benchmark by name and run it."""

import importlib
import sys

NAMES = ("arithmetic", "train")


def main() -> None:
    """Run the named benchmark; without a name, those that need no data of yours."""
    names = sys.argv[1:2] or ["arithmetic"]
    if names[0] not in NAMES:
        sys.exit(f"no benchmark {names[0]!r}: {', '.join(NAMES)}")
    importlib.import_module(f"bench.{names[0]}").main(sys.argv[2:])


main()
