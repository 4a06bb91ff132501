"""The `watch` command: what is watched, and for which store."""

import os
from pathlib import Path

import click

from mmalign.cli.folder import is_plain_folder, place_of, source_of
from mmalign.cli.options import PLACE, FolderPath, column_options
from mmalign.cli.watcher import Watcher
from mmalign.errors import UsageError

FEWEST_S, MOST_S = 0.1, 86_400.0


@click.command()
@click.argument("folder", type=FolderPath())
@click.option(
    "--store", metavar="STORE", type=PLACE,
    help="The store to keep; by default the one that a search of the folder keeps.",
)  # fmt: skip
@click.option("--here", is_flag=True, help="Keep the store in the folder, hidden.")
@click.option(
    "--every", default=2.0, show_default=True, metavar="SECONDS", help="Pause between two looks."
)
@click.option(
    "--model", metavar="RUN_OR_NAME", type=PLACE,
    help="The model of a new store, or where that of the store was moved.",
)  # fmt: skip
@click.option(
    "--yes", is_flag=True,
    help="Download the default model without a question, and drop more than a tenth of the rows at "
    "once, unless a whole folder of images is gone.",
)  # fmt: skip
@column_options
def watch(
    *,
    folder: Path,
    store: str | None,
    here: bool,
    every: float,
    model: str | None,
    yes: bool,
    caption_keys: tuple[str, ...],
    image_column: str | None,
) -> None:
    """Keep the store of a folder of images up to date.

    New and changed images are embedded as soon as they stay the same for two looks at the folder,
    rows of images that are gone are dropped, and each change set is told in a line. It goes on
    until Ctrl-C or SIGTERM; what was embedded is in the store.

    If the folder is gone or empty, as that of an unplugged drive is, all rows stay, and the watch
    goes on when it is back.

    \b
    Example:  mmalign watch photos/ --model run
              mmalign watch photos/ --store photos.store --every 10
    """
    if store is not None and here:
        raise UsageError("give either --store or --here: both were given")
    if not FEWEST_S <= every <= MOST_S:
        raise UsageError(f"--every {every:g}: give from {FEWEST_S:g} to {MOST_S:g} seconds")
    if folder.exists() and not is_plain_folder(folder):
        kind = "a store" if folder.is_dir() else "not a folder"
        raise UsageError(f"{folder}: {kind}: give a folder of images to watch")
    # A store that others fill, too, has the paths that `mmalign embed` gives its images.
    source = source_of(folder) if store is None else os.path.abspath(folder)
    place = place_of(folder, here=here) if store is None else Path(store)
    columns = {"caption_keys": caption_keys or ("captions",), "image_column": image_column}
    Watcher(folder, source, place, every=every, model=model, yes=yes, columns=columns).run()
