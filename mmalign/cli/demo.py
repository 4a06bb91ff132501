"""`mmalign demo`: the whole pipeline on generated scenes, with the commands used for real data.

draw -> train -> embed -> index -> search in two languages -> evaluate -> sheet and report
"""

import math
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmalign import files
from mmalign.data import Augment
from mmalign.data.scenes import write_scenes
from mmalign.embedding.embed import embed
from mmalign.errors import UsageError
from mmalign.evaluation.evaluate import RECALL_KS, evaluate
from mmalign.progress import bar, say
from mmalign.search.build import build_index
from mmalign.search.searcher import Searcher
from mmalign.search.sheet import Strip, draw_sheet, tiles_of
from mmalign.training.train import TrainConfig, train

LANGUAGES = {"english": "captions", "chinese": "captions_zh"}
HELD_OUT_SCENES = 1_000
# Training is limited by time. Two passes over the scenes gave a recall@1 of 50 %, three 67 %.
FEW_PASSES = 4
# Held-out scenes to search for, as (row, caption number: English first, then Chinese).
LOOKED_FOR = ((7, 0), (8, 4), (21, 1), (34, 7), (50, 2), (61, 6))
LAST_LOOKED_FOR = max(row for row, _ in LOOKED_FOR)


def demo(
    out: str | Path,
    *,
    scenes: int = 12_000,
    minutes: float = 4.0,
    held_out: int = HELD_OUT_SCENES,
) -> dict[str, Any]:
    """Run the whole pipeline and write run/, scenes.store/, sheet.png and report.json to a folder.

    Args:
        out: The folder; it must be new or empty.
        scenes: Scenes to train on.
        minutes: Training time.
        held_out: Number of held-out scenes to search.

    Returns:
        The content of report.json: recall@1/5/10 on the held-out scenes, in each language and
        direction, and the seconds of every step.
    """
    folder = Path(out)
    if not held_out > LAST_LOOKED_FOR:
        raise UsageError(f"held_out={held_out} must be above {LAST_LOOKED_FOR}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        state = "already contains a demo" if (folder / "run").exists() else "is not empty"
        raise UsageError(f"{folder}: {state}: delete it, or use another --out")
    folder.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    training, unseen = folder / "scenes-train.tar", folder / "scenes-test.tar"
    run, store = folder / "run", folder / "scenes.store"
    keys = tuple(LANGUAGES.values())

    with _timed("draw", seconds), bar("draw", scenes + held_out) as progress:
        _draw(training, scenes, 1, progress.update)
        _draw(unseen, held_out, 2, progress.update)
    with _timed("train", seconds):
        config = TrainConfig(
            preset="nano",
            caption_keys=keys,
            minutes=minutes,
            captions_per_image=4,
            learning_rate=2e-3,
            validations=4,
            caption_loss=0.5,
            batch_size=256,
            weight_decay=0.2,
            # Small images of small shapes teach little: train at full size from the first step.
            start_size=1.0,
            augment=Augment(crop_min=0.85, aspect=1.05, colour=0.1, erase=0.0),
        )
        passes = train([str(training)], run, config)["epoch"]
    with _timed("embed", seconds):
        embed(run, [str(unseen)], store, caption_keys=keys)
    with _timed("index", seconds):
        build_index(store)
    with _timed("evaluate", seconds):
        recalls = {
            language: evaluate(run, [str(unseen)], caption_keys=[key])
            for language, key in LANGUAGES.items()
        }
    with _timed("search", seconds):
        _sheet(Searcher.open(store), folder / "sheet.png", recalls)
    report = {"recall": recalls, "seconds": seconds, "scenes": scenes, "minutes": minutes}
    report["passes"] = round(passes, 2)
    files.write_json(folder / "report.json", report)
    _summary(folder, report)
    return report


def _draw(tar: Path, count: int, seed: int, tick: Callable[[], object]) -> None:
    files.write_through(tar, lambda path: write_scenes(Path(path), count, seed=seed, tick=tick))


@contextmanager
def _timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - started, 1)


def _sheet(searcher: Searcher, path: Path, recalls: dict[str, dict[str, Any]]) -> None:
    """Draw a sheet of captions of held-out scenes and their hits, with the correct scene framed."""
    rows = searcher.store.rows([row for row, _ in LOOKED_FOR], ("id", "captions"))
    asked = [
        (row["captions"][number], row["id"])
        for row, (_, number) in zip(rows, LOOKED_FOR, strict=True)
    ]
    strips = []
    for (query, own), hits in zip(
        asked, searcher.search_many([q for q, _ in asked], 6), strict=True
    ):
        strips.append(Strip(query, tiles_of(searcher.store, hits, own)))
    first = {name: r["image_retrieval_recall@1"] for name, r in recalls.items()}
    note = (
        f"{len(searcher.store):,} scenes never seen in training; recall@1: "
        f"English {first['english']:.1%}, Chinese {first['chinese']:.1%}. "
        "Green: the scene that the caption was written for."
    )
    draw_sheet(strips, path, "Words find pictures", note)


def _summary(folder: Path, report: dict[str, Any]) -> None:
    took = sum(report["seconds"].values()) / 60
    unseen = report["recall"]["english"]["images"]
    say(f"\n{unseen:,} scenes never seen in training, in two languages ({took:.1f} min):")
    for language, recalls in report["recall"].items():
        for name, kind in (("text->image", "image"), ("image->text", "text")):
            values = " / ".join(
                f"{recalls[f'{kind}_retrieval_recall@{k}']:6.1%}" for k in RECALL_KS
            )
            say(f"  {language:8} {name}  recall@1/5/10  {values}")
    minutes, passes = report["minutes"], report["passes"]
    if passes < FEW_PASSES:
        longer = math.ceil(minutes * FEW_PASSES / max(passes, 0.1))
        say(
            f"in {minutes:g} minutes of training, each scene was seen only {passes:.1f} times, "
            "because this machine is slow or busy; for better results, run\n"
            f"         mmalign demo --minutes {longer} --out {shlex.quote(f'{folder}-longer')}"
        )
    say(f"\nlook at  {folder / 'sheet.png'}")
    store = shlex.quote(str(folder / "scenes.store"))
    say(f'and try  mmalign search {store} "two large red stars" --sheet hits.png')
