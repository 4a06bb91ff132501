"""Shell completion: the scripts, and what they are answered."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from command import call, complaint

from mmalign.cli.main import main


def completed(*words: str) -> list[tuple[str, str]]:
    """Return the kind and value of what bash is told for the last word."""
    typed = ["mmalign", *words]
    asked = {
        "_MMALIGN_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(typed),
        "COMP_CWORD": str(len(typed) - 1),
    }
    result = CliRunner().invoke(main, [], prog_name="mmalign", env=asked)
    assert (result.exit_code, result.stderr) == (0, "")
    pairs = [line.partition(",") for line in result.stdout.splitlines() if line]
    return [(kind, value) for kind, _, value in pairs]


def test_commands_options_and_choices_are_completed() -> None:
    assert completed("sea") == [("plain", "search")]
    assert [value for _, value in completed("")] == list(main.commands)
    assert completed("search", "--cs") == [("plain", "--csv")]
    assert completed("completion", "") == [("plain", s) for s in ("bash", "zsh", "fish")]


def test_paths_are_left_to_the_shell() -> None:
    assert completed("info", "pho") == [("dir", "pho")]
    assert completed("embed", "--data", "pho") == [("file", "pho")]
    # The query may be an image.
    assert completed("search", "a.store", "ca") == [("file", "ca")]
    assert completed("search", "a.store", "--where", "pr") == []


def test_an_unknown_command_is_not_talked_of_while_it_is_typed() -> None:
    assert completed("serch", "x") == []
    assert "did you mean 'search'" in complaint(2, "serch", "x")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_script(shell: str) -> None:
    result = call("completion", shell)
    assert result.exit_code == 0
    assert f"_MMALIGN_COMPLETE={shell}_complete" in result.stdout
    assert b"\r" not in result.stdout_bytes


def test_another_shell_is_refused() -> None:
    assert "'tcsh' is not one of 'bash', 'zsh', 'fish'" in complaint(2, "completion", "tcsh")


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_by_the_script(tmp_path: Path) -> None:
    program = tmp_path / "mmalign"
    program.write_text(
        f"#!{sys.executable}\nfrom mmalign.cli.main import main\nmain()\n", encoding="utf-8"
    )
    program.chmod(0o755)
    code = """
        eval "$(mmalign completion bash)"
        complete -p mmalign >&2
        COMP_WORDS=(mmalign search --t); COMP_CWORD=2
        _mmalign_completion mmalign
        printf '%s ' "${COMPREPLY[@]}"
    """
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "--norc", "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["--to", "--thumbs", "--table", "--tsv"]
    assert "_mmalign_completion mmalign" in done.stderr
