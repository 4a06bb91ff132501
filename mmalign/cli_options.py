"""What several commands share: their options, and how an answer is printed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout."
)
model_option = click.option(
    "--model", required=True, metavar="RUN_OR_NAME",
    help="A run folder, or an open_clip model as NAME:TAG or NAME:FILE.",
)  # fmt: skip
store_argument = click.argument("store", type=click.Path(path_type=Path))
where_option = click.option(
    "--where", "where", metavar="SQL",
    help="Rows by SQL over id, uri, captions, meta and the fields of meta.",
)  # fmt: skip


def print_values(values: dict[str, Any], as_json: bool) -> None:
    """Print an answer as one JSON object, or as lines for a person."""
    if as_json:
        click.echo(json.dumps(values, ensure_ascii=False))
        return
    flat = dict(_flatten(values))
    width = max(len(k) for k in flat)
    for key, value in flat.items():
        shown = f"{value:.4f}" if isinstance(value, float) else value
        click.echo(f"{key:<{width}}  {shown}")


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Turn nested tables into dotted names."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        elif not isinstance(value, list):
            yield prefix + key, value
