"""Calls of the command line, and what they say."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mmalign.cli.main import main


def call(*words: str | Path, typed: str | None = None) -> Result:
    """Call `mmalign`, with what is typed in; an escaped exception is a failure of the test."""
    result = CliRunner().invoke(main, [str(w) for w in words], prog_name="mmalign", input=typed)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def complaint(code: int, *words: str | Path) -> str:
    """Return the one line that a failing call ends with, after checking the rules for all."""
    result = call(*words)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith(("mmalign: ", "Error: "))]
    assert len(said) == 1
    assert lines[-1] == said[0]
    return said[0]


def answer(*words: str | Path) -> dict[str, Any]:
    """Return the one JSON object of a call that goes well."""
    result = call(*words, "--json")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    value = json.loads(result.stdout, parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert isinstance(value, dict)
    return value


def proposed(message: str) -> list[list[str]]:
    """Return the commands that a message proposes, without `mmalign`."""
    return [shlex.split(c)[1:] for c in re.findall(r"`(mmalign [^`]+)`", message)]


def follow(result: Result, code: int = 1, **values: str | Path) -> None:
    """Run what the message of a call proposes, placeholders filled in; it must go well."""
    assert result.exit_code == code, result.output
    commands = proposed(result.stderr)
    assert commands, result.stderr
    for words in commands:
        done = call(*(values.get(word, word) for word in words))
        assert done.exit_code in (0, 1) if words[0] == "verify" else done.exit_code == 0, (
            done.output
        )
