"""The whole path in folders that can do less: no hard links, no case, no writing.

An audit hook of Python stands for the file system, so each runs in a process of its own.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import write_pairs

WITH_A_HOOK = """
import errno, json, os, sys
from pathlib import Path
from click.testing import CliRunner

folder = os.path.realpath(sys.argv[1])
made, writable = set(), True
CHANGES = {
    "os.mkdir": [0], "os.rmdir": [0], "os.remove": [0], "os.rename": [0, 1], "os.symlink": [1],
    "os.truncate": [0], "os.utime": [0], "os.chmod": [0],
}


def hook(event, args):
    if event == "os.link":
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), args[0], None, args[1])
    places = [args[i] for i in CHANGES.get(event, ())]
    if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        places = [args[0]]
    for place in places:
        if not isinstance(place, (str, bytes, os.PathLike)):
            continue
        path = os.path.realpath(os.fsdecode(place))
        if path.startswith(folder + os.sep):
            if not writable:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
            made.add(path)


sys.addaudithook(hook)
from mmalign.cli.main import main

for commands, writable in json.loads(sys.argv[2]):
    for words in commands:
        result = CliRunner().invoke(main, words, prog_name="mmalign")
        bug = result.exception and not isinstance(result.exception, SystemExit)
        said = [repr(result.exception) if bug else "", result.stdout, result.stderr]
        print(json.dumps([words[0], result.exit_code, *said]))
print(json.dumps(sorted(made)))
"""


def in_folder(folder: Path, *phases: tuple[list[list[Any]], bool]) -> tuple[list[Any], list[str]]:
    """Run commands where a folder has no hard links and may be read-only.

    Returns: (command, exit code, bug, stdout, stderr) of each, and all names that were made.
    """
    told = json.dumps([[[[str(w) for w in c] for c in cs], writable] for cs, writable in phases])
    words = [sys.executable, "-c", WITH_A_HOOK, str(folder), told]
    done = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    *results, made = map(json.loads, done.stdout.splitlines())
    return results, made


@pytest.mark.slow
def test_the_whole_path_without_hard_links_without_case_and_then_read_only(
    run: Path, tmp_path: Path
) -> None:
    folder, outside = tmp_path / "stick", tmp_path / "outside"
    outside.mkdir()
    photos, own, store = write_pairs(folder / "photos", 8), folder / "run", folder / "a.store"
    shutil.copytree(run, own)
    write: list[list[Any]] = [
        ["embed", "--model", own, "--data", photos, "--out", store],
        ["delete", store, "photos/003.jpg", "--yes"],
        ["compact", store, "--now"],
        ["index", store],
        ["export", store, "--to", folder / "parts", "--format", "npy"],
        ["import", folder / "parts", "--out", folder / "b.store", "--model", own],
        ["train", "--data", photos, "--out", folder / "run2", "--set", "preset=nano"],
    ]
    write[-1] += ["--set", "epochs=1", "--set", "batch_size=4", "--set", "arithmetic=float32"]
    read: list[list[Any]] = [
        ["search", store, "picture 5", "-k", "2", "--json"],
        ["search", store, photos / "005.jpg", "-k", "2", "--sheet", outside / "hits.png"],
        ["info", store],
        ["verify", store],
        ["export", store, "--to", outside / "a.parquet", "--format", "parquet"],
        ["embed", "--model", own, "--data", photos, "--out", outside / "c.store"],
        ["evaluate", "--model", own, "--data", photos],
    ]
    refused: list[list[Any]] = [
        ["embed", "--model", own, "--data", photos, "--out", folder / "new.store"],
        ["delete", store, "photos/004.jpg", "--yes"],
        ["compact", store, "--now"],
        ["index", store],
        ["repair", store],
        ["export", store, "--to", folder / "a.parquet", "--format", "parquet"],
        ["train", "--data", photos, "--out", folder / "run3", "--set", "preset=nano"],
    ]
    results, made = in_folder(folder, (write, True), ([*read, *refused], False))
    good, bad = results[: -len(refused)], results[-len(refused) :]
    assert [r for r in good if r[1] != 0 or r[2]] == []
    assert json.loads(good[len(write)][3])["hits"][0]["rank"] == 1
    generations = list(store.glob("manifest-*.json"))
    assert generations
    assert all(map(Path.is_dir, generations))
    # Whoever finds nothing to mend writes nothing.
    for command, code, bug, _, said in bad:
        lines = [line for line in said.replace("\r", "\n").splitlines() if line.strip()]
        assert (code, bug) == (0 if command == "repair" else 1, ""), (command, bug, said)
        if command != "repair":
            assert "ead-only file system" in lines[-1], (command, said)
            assert str(folder) in lines[-1]
    # A file system that knows no case would take two names that differ only in it for one.
    assert len({name.lower() for name in made}) == len(made) > 40
