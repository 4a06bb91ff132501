"""Write the API reference from docstrings: `make docs` calls this.

Names of the package are loaded on first use, which pdoc does not see; so each is used once.
"""

import sys
from pathlib import Path

import pdoc

import mmalign


def main() -> None:
    """Write HTML pages into the folder that is named."""
    for name in mmalign.__all__:
        setattr(mmalign, name, getattr(mmalign, name))
    pdoc.render.configure(docformat="google", search=False, show_source=False)
    pdoc.pdoc("mmalign", output_directory=Path(sys.argv[1]))


if __name__ == "__main__":
    main()
