"""The `mmalign` command: parse, call one verb, print or answer.

Only click and the error tree are loaded up front; each command imports what it needs. Results go to
stdout (`--json`: one object), everything else to stderr. Exit codes: 0 well, 1 it could not be
done, 2 the call was off, 130 interrupted.
"""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mmalign import __version__, cli_store
from mmalign.cli_options import json_option as _json
from mmalign.cli_options import model_option as _model
from mmalign.cli_options import print_values as _print
from mmalign.cli_options import store_argument as _store
from mmalign.cli_options import where_option as _where
from mmalign.errors import MmalignError, UsageError, nearest

Command = Callable[..., Any]


class _Group(click.Group):
    """Shows our errors as one line, and the nearest name for an unknown command."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise click.UsageError(
                f"no command {args[0]!r}: {nearest(args[0], self.commands)}", ctx
            )
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, **words: Any) -> Any:
        """Run a command; a mistake in its words is one line too."""
        try:
            code = super().main(*args, **{**words, "standalone_mode": False})
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.ctx.get_help() if error.ctx else "", err=True)
            code = 2
        except click.ClickException as error:
            where = getattr(error, "ctx", None)
            hint = f" (see {where.command_path} --help)" if where else ""
            click.echo(f"mmalign: {error.format_message().rstrip('.')}{hint}", err=True)
            code = error.exit_code
        except click.Abort:
            code = 130
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MmalignError as error:
            click.echo(f"mmalign: {error}", err=True)
            ctx.exit(error.exit_code)
        except OSError as error:
            # A place that cannot be read or written, or a full disk; others are bugs or pipes.
            if error.filename is None and error.errno != errno.ENOSPC:
                raise
            place = f"{error.filename}: " if error.filename is not None else ""
            click.echo(f"mmalign: {place}{error.strerror}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("mmalign: interrupted", err=True)
            ctx.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mmalign")
def main() -> None:
    """Align images and text, store their embeddings, and find one by the other.

    \b
    The path:  train -> embed -> index -> search
    Try it:    mmalign demo
    """


def _sources(required: bool = True) -> Callable[[Command], Command]:
    return click.option(
        "--data", "data", multiple=True, required=required, metavar="SRC",
        help="Folder, .tar (braces and globs), .parquet, .csv, .tsv, .jsonl, or URL. Repeatable.",
    )  # fmt: skip


_caption_key = click.option(
    "--caption-key", "caption_keys", multiple=True, metavar="KEY",
    help="Where captions stand in the .json or table; repeatable. Default: captions.",
)  # fmt: skip


@main.command()
@click.option("--out", default="demo", show_default=True, help="Folder for everything it makes.")
@click.option("--scenes", default=12_000, show_default=True, help="Scenes to train on.")
@click.option("--minutes", default=4.0, show_default=True, help="Time to train.")
def demo(out: str, scenes: int, minutes: float) -> None:
    """Draw scenes, train on them, and search them in English and Chinese.

    \b
    Example:  mmalign demo --out demo
    """
    from mmalign.demo import demo as run

    run(out, scenes=scenes, minutes=minutes)


@main.command()
@_sources()
@click.option(
    "--val", multiple=True, metavar="SRC", help="Validation pairs; else some are held out."
)
@click.option("--out", required=True, metavar="RUN", help="Folder for the run.")
@click.option("--config", metavar="FILE.toml", help="Fields of TrainConfig as TOML.")
@click.option("--preset", metavar="NAME", help="Our own, from scratch: nano, tiny, small.")
@click.option("--model", metavar="NAME", help="An open_clip architecture.")
@click.option("--pretrained", metavar="TAG_OR_PATH", help="Its weights.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override one field.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
@_caption_key
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
    """Train a dual encoder on pairs, from scratch or from pretrained weights.

    \b
    Example:  mmalign train --data 'pairs-{000..005}.tar' --val val.tar --out run
              mmalign train --data photos/ --out run --set epochs=20 --set augment.flip=true
              mmalign train --data photos/ --out run --resume
    """
    from mmalign.config import override, read_toml
    from mmalign.train import configure
    from mmalign.train import train as run

    # A run that is resumed goes on with its own configuration unless told otherwise.
    own = Path(out) / "config.toml"
    file = config or (str(own) if resume and own.exists() else None)
    values = read_toml(Path(file)) if file else {}
    values |= {k: v for k, v in words.items() if v is not None}
    if caption_keys:
        values["caption_keys"] = caption_keys
    where = f"{file} and --set" if settings and file else (file or "--set")
    built = configure(override(values, settings), where)
    _print(run(built, data, out, val=val, resume=resume), as_json)


@main.command()
@_model
@_sources()
@click.option("--out", required=True, metavar="STORE", help="The store, by convention NAME.store.")
@click.option("--thumbnails/--no-thumbnails", default=True, help="Keep a small picture of each.")
@click.option(
    "--precision", type=click.Choice(["auto", "float32", "bfloat16", "int8"]), default="auto",
    show_default=True, help="Arithmetic; auto is the fastest that keeps a cosine of 0.999.",
)  # fmt: skip
@click.option("--checksum", is_flag=True, help="Compare the content of images that are there.")
@click.option("--drop-removed", is_flag=True, help="Delete rows whose image left its source.")
@click.option(
    "--shard", "part", default="1/1", metavar="I/N", show_default=True,
    help="Embed the I-th of N parts: N processes can fill one store.",
)  # fmt: skip
@_caption_key
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
    """Embed images and captions into a store; again = go on, add what is new or changed.

    \b
    Example:  mmalign embed --model run --data photos/ --out photos.store
              mmalign embed --model run --data photos/ --out photos.store --drop-removed
              mmalign embed --model ViT-B-32:openai --data 'm-{0..9}.tar' --out m.store --shard 1/4
    """
    from dataclasses import asdict

    from mmalign.embed import embed as run

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
@click.option("--memory", default="2GB", show_default=True, help="What the index may hold.")
@click.option("--queries", metavar="FILE", help="Text queries to measure with, one a line.")
@_json
def index(store: Path, recall: float, memory: str, queries: str | None, as_json: bool) -> None:
    """Build an index over a store that finds what it promises, measured on text queries.

    Which kind of index is chosen by trying them on the store's own captions, or on FILE's queries.

    \b
    Example:  mmalign index photos.store --recall 0.95 --memory 300MB
    """
    from mmalign.build import build

    report = build(store, recall=recall, memory=memory, queries=queries)
    if as_json:
        _print(report, as_json)


@main.command()
@_store
@click.argument("query")
@click.option("-k", default=10, show_default=True, help="Results wanted.")
@click.option(
    "--to", type=click.Choice(["image", "text"]), default="image", show_default=True,
    help="Search among the images or among their captions.",
)  # fmt: skip
@_where
@click.option("--exact", is_flag=True, help="Compare every row, whatever index there is.")
@click.option("--sheet", metavar="FILE.png", help="Draw the hits as a contact sheet.")
@click.option("--model", metavar="RUN_OR_NAME", help="The model, if it moved since embedding.")
@_json
def search(
    *,
    store: Path,
    query: str,
    k: int,
    to: Any,
    where: str | None,
    exact: bool,
    sheet: str | None,
    model: str | None,
    as_json: bool,
) -> None:
    """Find the images of a store nearest to QUERY: words, or the name of an image file.

    \b
    Example:  mmalign search photos.store "a dog on a beach" --sheet hits.png
              mmalign search photos.store cat.jpg --to text
              mmalign search photos.store "red" --where "label = 'dress' and price < 20"
    """
    import time
    from dataclasses import asdict

    from mmalign.search import Searcher, is_image

    searcher = Searcher.open(store, model)
    started = time.perf_counter()
    hits = searcher.search(query, k, to=to, exact=exact, where=where)
    took_ms = (time.perf_counter() - started) * 1e3
    if sheet:
        from mmalign.sheet import Strip, draw_sheet, tiles_of

        picture = Path(query).read_bytes() if is_image(query) else b""
        draw_sheet([Strip(query, tiles_of(searcher.store, hits), picture)], Path(sheet))
    if as_json:
        rows = [{k: v for k, v in asdict(h).items() if k != "row" and v is not None} for h in hits]
        answer = {"query": query, "hits": rows, "index": searcher.describe_index()}
        _print({**answer, "took_ms": round(took_ms, 3)}, as_json)
        return
    for hit in hits:
        words = hit.caption or (hit.captions[0] if hit.captions else "")
        click.echo(f"{hit.rank:>3}  {hit.score:.3f}  {hit.id}  {words}")


@main.command()
@_model
@_sources()
@click.option("--classes", metavar="A,B,C", help="Class names (or a file, one a line): zero-shot.")
@click.option("--label-key", default="label", show_default=True, help="Where the class stands.")
@_caption_key
@_json
def evaluate(
    *,
    model: str,
    data: tuple[str, ...],
    classes: str | None,
    label_key: str,
    caption_keys: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure retrieval recall@1/5/10 in both directions, and zero-shot accuracy.

    \b
    Example:  mmalign evaluate --model run --data val.tar --caption-key captions_zh --json
    """
    from mmalign.evaluate import evaluate as run

    names = _class_names(classes) if classes is not None else []
    keys = caption_keys or ("captions",)
    _print(run(model, data, caption_keys=keys, classes=names, label_key=label_key), as_json)


def _class_names(classes: str) -> list[str]:
    try:
        is_file = os.path.isfile(classes)
        text = Path(classes).read_text(encoding="utf-8") if is_file else classes
    except UnicodeDecodeError as error:
        raise UsageError(f"--classes {classes}: not a text file: {error}") from None
    names = [w.strip() for w in (text.splitlines() if is_file else text.split(",")) if w.strip()]
    if not names:
        raise UsageError(f"--classes {classes}: no class name in it")
    return names


for _command in cli_store.COMMANDS:
    main.add_command(_command)
