"""TOML files into frozen dataclasses and back. Each dataclass is defined by the code it configures.

The dataclass is the schema: its field names are the keys, its types are checked, its defaults apply
if a key is absent. An unknown key is an error that names the nearest known one.
"""

import dataclasses
import json
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from mmalign.errors import ConfigError, nearest

T = TypeVar("T")


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file; a syntax error names the file and the position."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def build(cls: type[T], values: dict[str, Any], where: str = "configuration") -> T:
    """Build a frozen dataclass from plain values, checking every name and type."""
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    out = {}
    for name, value in values.items():
        if name not in fields:
            raise ConfigError(f"{where}: unknown key {name!r}: {nearest(name, fields)}")
        out[name] = _convert(hints[name], value, f"{where}: {name}")
    return cls(**out)


def require(holds: bool, name: str, value: object, rule: str) -> None:
    """Raise an error that names a value which breaks its rule."""
    if not holds:
        raise ConfigError(f"{name}={value} must be {rule}")


def override(
    values: dict[str, Any], settings: tuple[str, ...], *, null: bool = False
) -> dict[str, Any]:
    """Override values by `key=value` words (dots for nesting, TOML values, bare words as strings).

    Args:
        values: The values before.
        settings: The words.
        null: The bare word `null` is None.

    >>> override({"epochs": 3}, ("epochs=5", "augment.flip=true", "preset=tiny"))
    {'epochs': 5, 'augment': {'flip': True}, 'preset': 'tiny'}
    """
    out = json.loads(json.dumps(values))
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: write it as key=value")
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            value = None if null and text.strip() == "null" else text
        *path, last = key.strip().split(".")
        table = out
        for part in path:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"--set {setting}: {part} is a value, not a table")
        table[last] = value
    return typing.cast(dict[str, Any], out)


def dump(config: Any) -> str:
    """Format a dataclass as TOML; None is left out, as it is the default of its field.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Point:
    ...     x: int = 1
    ...     names: tuple[str, ...] = ("a",)
    >>> print(dump(Point()), end="")
    x = 1
    names = [
        "a",
    ]
    """
    return tomli_w.dumps(_without_none(dataclasses.asdict(config)))


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in table.items() if value is not None}
    return {k: _without_none(v) if isinstance(v, dict) else v for k, v in kept.items()}


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return build(typing.cast(type, hint), value, where)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is typing.Literal:
        if value not in args:
            raise ConfigError(f"{where}: unknown value {value!r}: {nearest(str(value), args)}")
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(args[0], v, where) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if dataclasses.is_dataclass(hint):
        keys = ", ".join(f.name for f in dataclasses.fields(hint))
        name = where.rpartition(": ")[2]
        raise ConfigError(f"{where} is a table with the keys {keys}: write {name}.KEY")
    plain = hint if isinstance(hint, type) else None
    if plain is None or type(value) is not plain:
        wanted = plain.__name__ if plain else str(hint)
        raise ConfigError(f"{where}: expected {wanted}, got {value!r}")
    return value
