"""Importing the package or asking for help must not load the heavy libraries."""

import subprocess
import sys

HEAVY = "{'torch','faiss','open_clip','triton','numpy','pyarrow','webdataset','PIL'}"


def loaded_by(code: str) -> str:
    probe = f"import sys\n{code}\nprint(sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def test_import_is_light() -> None:
    assert loaded_by("import mmalign, mmalign.cli") == "[]"


def test_help_is_light() -> None:
    code = "from mmalign.cli import main\ntry:\n    main(['train', '--help'])\nexcept SystemExit: 0"
    assert loaded_by(code) == "[]"


def test_the_probe_can_fail() -> None:
    assert loaded_by("import numpy") == "['numpy']"


def test_every_public_name_resolves() -> None:
    import mmalign

    for name in mmalign.__all__:
        assert getattr(mmalign, name) is not None
