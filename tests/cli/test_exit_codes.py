"""How each command ends: its exit code, and one line for whatever is not a bug."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from click.testing import CliRunner, Result

from mmalign.cli.main import main
from mmalign.errors import DataError, IdentityError, StoreError, UsageError
from mmalign.progress import bar

# Words that are well, and the function that does the work.
CALLS = {
    "demo": ("demo --out {tmp}/demo", "mmalign.cli.demo.demo"),
    "train": ("train --data {tmp} --out {tmp}/run", "mmalign.training.train.train"),
    "embed": ("embed --model m --data {tmp} --out {tmp}/s", "mmalign.embedding.embed.embed"),
    "index": ("index {tmp}/s", "mmalign.search.build.build_index"),
    "search": ("search {tmp}/s red", "mmalign.store.open_store"),
    "watch": ("watch {tmp}", "mmalign.cli.watch.Watcher.run"),
    "evaluate": ("evaluate --model m --data {tmp}", "mmalign.evaluation.evaluate.evaluate"),
    "info": ("info {tmp}/s", "mmalign.store.open_store"),
    "verify": ("verify {tmp}/s", "mmalign.store.verify"),
    "repair": ("repair {tmp}/s", "mmalign.store.repair"),
    "compact": ("compact {tmp}/s", "mmalign.store.compact"),
    "upgrade": ("upgrade {tmp}/s", "mmalign.store.upgrade"),
    "delete": ("delete {tmp}/s an-id", "mmalign.store.open_store"),
    "update": ("update {tmp}/s an-id --set a=1", "mmalign.store.open_store"),
    "list": ("list {tmp}/s", "mmalign.store.open_store"),
    "get": ("get {tmp}/s an-id", "mmalign.store.open_store"),
    "merge": ("merge {tmp}/a {tmp}/b --out {tmp}/s", "mmalign.store.merge"),
    "export": ("export {tmp}/s --to {tmp}/x --format npy", "mmalign.exchange.export.export"),
    "completion": ("completion bash", "click.shell_completion.BashComplete.source"),
    "import": ("import {tmp} --out {tmp}/s --model m", "mmalign.exchange.imports.import_parts"),
}


def out_of_memory_of_torch() -> Exception:
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


# What a command may meet, how it then ends, and what is said.
ENDS: list[tuple[Callable[[], BaseException], int, str]] = [
    (lambda: DataError("photos: no images found"), 1, "photos: no images found"),
    (lambda: StoreError("not read:\n\ta reason"), 1, "not read: a reason"),
    (lambda: IdentityError("two models"), 1, "two models"),
    (lambda: UsageError("--k 0 must be above 0"), 2, "--k 0 must be above 0"),
    (lambda: OSError(errno.ENOSPC, "No space left on device", "/d/x"), 1, "/d/x: No space left"),
    (lambda: OSError(errno.ENOSPC, "No space left on device"), 1, "temporary files ("),
    (lambda: OSError("4096 requested and 0 written"), 1, "4096 requested and 0 written"),
    (lambda: OSError(errno.EIO, "Input/output error"), 1, "Input/output error"),
    (lambda: PermissionError(errno.EACCES, "Permission denied", b"/d"), 1, "/d: Permission den"),
    (lambda: ConnectionResetError(errno.ECONNRESET, "Connection reset"), 1, "Connection reset"),
    (lambda: TimeoutError("timed out"), 1, "timed out"),
    (lambda: BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "Broken pipe"),
    (lambda: MemoryError("Unable to allocate 9 GiB"), 1, "out of memory: Unable to allocate"),
    (out_of_memory_of_torch, 1, "out of memory: CUDA"),
    (lambda: RuntimeError("DefaultCPUAllocator: can't allocate"), 1, "out of memory: Default"),
    (KeyboardInterrupt, 130, "interrupted"),
]
BUGS = [
    KeyError("a"), ValueError("b"), EOFError("c"), RuntimeError("d"), OSError(errno.EBADF, "e"),
    UnicodeEncodeError("ascii", "é", 0, 1, "f"),
]  # fmt: skip


def call(words: str, tmp: Path) -> Result:
    return CliRunner().invoke(main, words.format(tmp=tmp).split(), prog_name="mmalign")


def test_every_command_is_called_here() -> None:
    assert set(CALLS) == set(main.commands)


@pytest.mark.parametrize("command", sorted(CALLS))
def test_what_ends_a_command_is_one_line_and_a_code(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, verb = CALLS[command]
    for made, code, said in ENDS:

        def fail(*_: Any, make: Callable[[], BaseException] = made, **__: Any) -> NoReturn:
            # Left open, as by a generator that is still suspended: the message begins a line.
            bar("scan").update()
            raise make()

        monkeypatch.setattr(verb, fail)
        result = call(words, tmp_path)
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == code
        assert result.stdout == ""
        assert result.stderr.splitlines()[-1].startswith("mmalign: ")
        assert said in result.stderr.splitlines()[-1]
        assert result.stderr.count("mmalign: ") == 1


@pytest.mark.parametrize("command", sorted(CALLS))
def test_a_bug_keeps_its_traceback_and_asks_to_be_reported(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, verb = CALLS[command]
    for bug in BUGS:

        def fail(*_: Any, error: BaseException = bug, **__: Any) -> NoReturn:
            raise error

        monkeypatch.setattr(verb, fail)
        result = call(words, tmp_path)
        assert result.exception is bug
        assert any("report it" in note for note in bug.__notes__)


@pytest.mark.parametrize("command", sorted(CALLS))
def test_words_that_are_off_exit_with_2(command: str, tmp_path: Path) -> None:
    for words in (f"{command} --no-such-option", f"{command} --shard", command):
        if words == "demo":
            continue  # It needs no words.
        result = call(words, tmp_path)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", sorted(CALLS))
def test_sigterm_ends_a_command_as_ctrl_c_does(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, verb = CALLS[command]
    left = []

    def wait(*_: Any, **__: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            left.append("whole")

    monkeypatch.setattr(verb, wait)
    before = signal.getsignal(signal.SIGTERM)
    result = call(words, tmp_path)
    assert (result.exit_code, result.stderr, left) == (130, "mmalign: terminated\n", ["whole"])
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_process_shows_the_traceback_of_a_bug_and_exits_with_1() -> None:
    code = (
        "from mmalign.cli.main import main\n"
        "def fail(**_): raise KeyError('a bug')\n"
        "main.commands['info'].callback = fail\n"
        "main(['info', 'x'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("This is a bug in mmalign")


@pytest.mark.parametrize("words", ["--help", "search --help"])
def test_a_reader_that_leaves_is_no_error_to_talk_of(words: str) -> None:
    command = [sys.executable, "-m", "mmalign", *words.split()]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")
