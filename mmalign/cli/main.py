"""The `mmalign` command: parse the arguments, call one function, print the result.

Only click and the error classes are loaded up front; each command imports what it needs. Results go
to stdout (`--json`: one object), everything else to stderr. `errors.py` has the exit codes.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mmalign import __version__
from mmalign.cli import store as cli_store
from mmalign.cli.completion import completion
from mmalign.cli.errors import Commands
from mmalign.cli.options import PLACE
from mmalign.cli.options import column_options as _columns
from mmalign.cli.options import json_option as _json
from mmalign.cli.options import model_option as _model
from mmalign.cli.options import print_values as _print
from mmalign.cli.options import store_argument as _store
from mmalign.cli.search import search
from mmalign.cli.startup import quick_imports
from mmalign.cli.watch import watch
from mmalign.errors import UsageError
from mmalign.progress import to_stderr

Command = Callable[..., Any]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mmalign")
def main() -> None:
    """Align images and text in one embedding space, store the embeddings, and search them.

    \b
    The path:  train -> embed -> index -> search
    Try it:    mmalign demo
    """
    to_stderr()


def _sources(required: bool = True) -> Callable[[Command], Command]:
    return click.option(
        "--data", "data", multiple=True, required=required, metavar="SRC", type=PLACE,
        help="Folder, .tar (braces and globs), .parquet, .csv, .tsv, .jsonl, or URL. Repeatable.",
    )  # fmt: skip


@main.command()
@click.option(
    "--out", default="demo", show_default=True, type=PLACE, help="Folder for all results."
)
@click.option("--scenes", default=12_000, show_default=True, help="Number of scenes to train on.")
@click.option("--minutes", default=4.0, show_default=True, help="Training time in minutes.")
def demo(out: str, scenes: int, minutes: float) -> None:
    """Draw scenes, train on them, and search them in two languages.

    Takes about five minutes on two cores; --out must be a new folder.

    \b
    Example:  mmalign demo --out demo
    """
    with quick_imports():
        from mmalign.cli.demo import demo as run

    run(out, scenes=scenes, minutes=minutes)


@main.command()
@_sources(required=False)
@click.option(
    "--val",
    multiple=True,
    metavar="SRC",
    type=PLACE,
    help="Validation pairs; by default some training images are held out.",
)
@click.option("--out", required=True, metavar="RUN", type=PLACE, help="Folder for the run.")
@click.option("--config", metavar="FILE.toml", type=PLACE, help="Fields of TrainConfig as TOML.")
@click.option(
    "--preset", metavar="NAME",
    help="Train one of mmalign's own models from scratch: nano, tiny, small.",
)  # fmt: skip
@click.option("--model", metavar="NAME", help="An open_clip architecture.")
@click.option("--pretrained", metavar="TAG_OR_PATH", type=PLACE, help="Weights of --model.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE",
    help="Override one field of TrainConfig.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Resume the run in --out with the same data.")
@_columns
@_json
def train(
    *,
    data: tuple[str, ...],
    val: tuple[str, ...],
    out: str,
    config: str | None,
    settings: tuple[str, ...],
    resume: bool,
    caption_keys: tuple[str, ...],
    as_json: bool,
    **words: str | None,
) -> None:
    """Train a dual encoder on images and their captions.

    Starts from scratch (--preset) or from open_clip weights (--model and --pretrained).

    \b
    Example:  mmalign train --data photos/ --out run
              mmalign train --data 'pairs-{000..005}.tar' --val val.tar --out run
              mmalign train --data photos/ --out run --set epochs=20 --set augment.flip=true
              mmalign train --data photos/ --out run --model ViT-B-32 --pretrained openai
              mmalign train --out run --resume
    """
    from mmalign.config import override, read_toml

    with quick_imports():
        from mmalign.training.train import configure
        from mmalign.training.train import train as run

    # A resumed run keeps its own configuration unless told otherwise.
    own = Path(out) / "config.toml"
    file = config or (str(own) if resume and own.exists() else None)
    values = read_toml(Path(file)) if file else {}
    values |= {k: v for k, v in words.items() if v is not None}
    if caption_keys:
        values["caption_keys"] = caption_keys
    where = f"{file} and --set" if settings and file else (file or "--set")
    built = configure(override(values, settings), where)
    _print(run(data, out, built, val=val, resume=resume), as_json)


@main.command()
@_model
@_sources()
@click.option(
    "--out", required=True, metavar="STORE", type=PLACE, help="The store, by convention NAME.store."
)
@click.option(
    "--thumbnails/--no-thumbnails", default=True, help="Store a small picture of each image."
)
@click.option(
    "--precision", type=click.Choice(["auto", "float32", "bfloat16", "int8"]), default="auto",
    show_default=True,
    help="Precision; auto is bfloat16 if the processor supports it and cosines stay above 0.999.",
)  # fmt: skip
@click.option(
    "--checksum", is_flag=True, help="Also compare the content of images that look unchanged."
)
@click.option(
    "--drop-removed", is_flag=True, help="Delete rows whose images are gone from the sources."
)
@click.option(
    "--yes", is_flag=True,
    help="Allow deleting more than a tenth of the rows, and changing the model of a store although "
    "some of its images cannot be read.",
)  # fmt: skip
@click.option(
    "--shard", "part", default="1/1", metavar="I/N", show_default=True,
    help="Embed only the I-th of N parts; N processes can fill one store.",
)  # fmt: skip
@_columns
@_json
def embed(
    *,
    model: str,
    data: tuple[str, ...],
    out: str,
    part: str,
    caption_keys: tuple[str, ...],
    as_json: bool,
    **words: Any,
) -> None:
    """Embed images and captions into a store.

    Run it again to resume, and to add new or changed images. Images that were moved or renamed are
    not embedded again. With another model than that of the store, all its rows are embedded again,
    and searches go on with the old vectors until the new ones are complete.

    \b
    Example:  mmalign embed --model run --data photos/ --out photos.store
              mmalign embed --model run --data photos/ --out photos.store --drop-removed
              mmalign embed --model ViT-B-32:openai --data 'm-{0..9}.tar' --out m.store --shard 1/4
    """
    from dataclasses import asdict

    with quick_imports():
        from mmalign.embedding.embed import embed as run

    numbers = part.split("/")
    if len(numbers) != 2 or not all(n.isdecimal() for n in numbers):
        raise UsageError(f"--shard {part}: write i/n with i from 1 to n")
    keys = caption_keys or ("captions",)
    share = (int(numbers[0]), int(numbers[1]))
    report = run(model, data, out, caption_keys=keys, part=share, **words)
    if as_json:
        _print(asdict(report), as_json)


@main.command()
@_store
@click.option("--recall", default=0.95, show_default=True, help="Share of true neighbours to find.")
@click.option("--memory", default="2GB", show_default=True, help="Memory limit of the index.")
@click.option(
    "--queries", metavar="FILE", type=PLACE, help="Text queries to measure with, one per line."
)
@click.option(
    "--model", metavar="RUN_OR_NAME", type=PLACE,
    help="The model that encodes FILE, if it was moved since embedding.",
)  # fmt: skip
@click.option(
    "--prefer", metavar="MODALITY",
    help="Choose the index that is fastest for queries of this kind: text (the default), image.",
)  # fmt: skip
@_json
def index(
    *,
    store: Path,
    recall: float,
    memory: str,
    queries: str | None,
    model: str | None,
    prefer: str | None,
    as_json: bool,
) -> None:
    """Build an index over a store and measure its recall.

    Several kinds of index are tried, with the store's captions or the queries of FILE. A small
    store needs no index: every row is compared. All kinds of queries reach the recall; those by
    text decide which index is the fastest, unless --prefer names others.

    \b
    Example:  mmalign index photos.store
              mmalign index photos.store --recall 0.95 --memory 300MB
              mmalign index photos.store --prefer image
    """
    with quick_imports():
        from mmalign.search.build import build_index

    report = build_index(
        store, recall=recall, memory=memory, queries=queries, model=model, prefer=prefer
    )
    if as_json:
        _print(report, as_json)


@click.command()
@_model
@_sources()
@click.option(
    "--classes", metavar="A,B,C", type=PLACE,
    help="Class names for zero-shot accuracy, or a file with one per line.",
)  # fmt: skip
@click.option(
    "--label-key", default="label", show_default=True, help="Metadata field with the class."
)
@_columns
@_json
def evaluate(
    *,
    model: str,
    data: tuple[str, ...],
    classes: str | None,
    label_key: str,
    caption_keys: tuple[str, ...],
    image_column: str | None,
    as_json: bool,
) -> None:
    """Measure retrieval (recall@1/5/10) and zero-shot accuracy.

    \b
    Example:  mmalign evaluate --model run --data val.tar
              mmalign evaluate --model run --data val.tar --caption-key captions_zh --json
              mmalign evaluate --model run --data val.tar --classes dress,hat --label-key label
    """
    with quick_imports():
        from mmalign.evaluation.evaluate import evaluate as run

    names = _class_names(classes) if classes is not None else []
    keys = caption_keys or ("captions",)
    report = run(
        model, data, caption_keys=keys, image_column=image_column, classes=names,
        label_key=label_key,
    )  # fmt: skip
    _print(report, as_json)


def _class_names(classes: str) -> list[str]:
    try:
        is_file = os.path.isfile(classes)
        text = Path(classes).read_text(encoding="utf-8") if is_file else classes
    except UnicodeDecodeError as error:
        raise UsageError(f"--classes {classes}: not a text file: {error}") from None
    names = [w.strip() for w in (text.splitlines() if is_file else text.split(",")) if w.strip()]
    if not names:
        raise UsageError(f"--classes {classes}: contains no class name")
    return names


for _command in (search, watch, evaluate, *cli_store.COMMANDS, completion):
    main.add_command(_command)
