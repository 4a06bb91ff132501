"""Drawn scenes as a benchmark: what is in each is known, and so is what each query should find.

A model is trained on complete descriptions and on short ones of one group of shapes or of both; the
store that is searched has other scenes, with the complete descriptions as its captions.

Shapes: N scenes, D dimensions.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np

from mmalign.arrays import Bools, Floats
from mmalign.data import Augment
from mmalign.data.scenes import (
    COLOURS,
    COUNTS,
    SHAPES,
    SIZES,
    TEXTURES,
    Group,
    Scene,
    random_scene,
    sample,
)
from mmalign.embedding.embed import embed
from mmalign.model import Encoder
from mmalign.search.build import build_index
from mmalign.search.model import model_of
from mmalign.store import Store, open_store
from mmalign.training.train import TrainConfig, train

LANGUAGES = ("en", "zh")
KEYS = ("captions", "captions_zh")
TRAINING_SEED, SEED = 11, 12
ORDER = ("size", "colour", "texture", "shape")


@dataclass(frozen=True)
class Asked:
    """Some attributes of a group of shapes, as a query."""

    parts: tuple[tuple[str, str], ...]
    """Names of attributes and their values, in the order of `ORDER`."""

    def text(self, language: str, count: int = 1) -> str:
        """Say it: `a red striped star`, `红色条纹星形`."""
        values = dict(self.parts)
        words = {
            "size": SIZES.get(values.get("size", "")),
            "colour": COLOURS[values["colour"]][0] if "colour" in values else None,
            "texture": TEXTURES.get(values.get("texture", "")),
            "shape": SHAPES.get(values.get("shape", "")),
        }
        said = [(name, word) for name in ORDER if (word := words[name]) is not None]
        if language == "zh":
            counted = COUNTS[count].zh if count > 1 else ""
            return counted + "".join(w.zh + "的" * (name == "size") for name, w in said)
        noun = said[-1][1].en
        if count > 1:
            noun += "es" if noun.endswith("s") else "s"
        return " ".join([COUNTS[count].en, *(word.en for _, word in said[:-1]), noun])

    def fits(self, group: Group) -> bool:
        """Whether a group of shapes has all of these attributes."""
        return all(getattr(group, name) == value for name, value in self.parts)

    def within(self, scene: Scene) -> bool:
        """Whether a group of the scene fits."""
        return self.fits(scene.first) or self.fits(scene.second)


def combinations(*names: str) -> list[Asked]:
    """Return all values of some attributes, combined."""
    values: dict[str, Iterable[str]] = {
        "size": SIZES,
        "colour": COLOURS,
        "texture": TEXTURES,
        "shape": SHAPES,
    }
    return [
        Asked(tuple(zip(names, chosen, strict=True)))
        for chosen in product(*(values[name] for name in names))
    ]


def scene_of(seed: int, number: int) -> Scene:
    """Return what scene `number` of a series shows."""
    return random_scene(np.random.default_rng((seed, number)))


def short_captions(scene: Scene, rng: np.random.Generator, language: str) -> list[str]:
    """Describe one group, the other, and both, each with some of its attributes."""
    said = []
    for group in (scene.first, scene.second):
        kept = [name for name in ORDER[:-1] if rng.random() < 0.5]
        parts = tuple((name, getattr(group, name)) for name in (*kept, "shape"))
        said.append(Asked(parts).text(language, group.count if rng.random() < 0.5 else 1))
    if rng.random() < 0.5:
        said.reverse()
    return [*said, (" and " if language == "en" else "和").join(said)]


def write(tar: Path, count: int, seed: int, *, captions: str) -> None:
    """Write scenes as a WebDataset tar.

    Args:
        tar: The file.
        count: Number of scenes.
        seed: The series.
        captions: "complete", "short" for one complete and three short ones, or "none".
    """
    from webdataset import TarWriter

    with TarWriter(str(tar), encoder=True) as writer:
        for number in range(count):
            drawn = sample(seed, number)
            if captions == "none":
                drawn = {name: drawn[name] for name in ("__key__", "png")}
            if captions == "short":
                rng, scene = np.random.default_rng((seed, number, 1)), scene_of(seed, number)
                complete = (scene.captions(), scene.captions_zh())
                drawn["json"] = {
                    key: [texts[rng.integers(len(texts))], *short_captions(scene, rng, language)]
                    for key, language, texts in zip(KEYS, LANGUAGES, complete, strict=True)
                }
            writer.write(drawn)


@dataclass(frozen=True)
class Drawn:
    """A store of drawn scenes and its model."""

    folder: Path
    store: Store
    encoder: Encoder

    def captioned(self, captions: str) -> "Drawn":
        """Return a store of the same scenes with other captions, see `write`."""
        tar, store = (self.folder / f"{captions}.{kind}" for kind in ("tar", "store"))
        if not store.exists():
            write(tar, len(self.store), SEED, captions=captions)
            embed(self.folder / "run", [str(tar)], store, caption_keys=KEYS)
            build_index(store)
        return Drawn(self.folder, open_store(store), self.encoder)

    @cached_property
    def scenes_N(self) -> list[Scene]:
        """What each row shows."""
        return [scene_of(SEED, int(row_id.rsplit("/", 1)[-1])) for row_id in self.ids]

    @cached_property
    def ids(self) -> list[str]:
        """The id of each row."""
        return [row["id"] for row in self.store.rows(np.arange(len(self.store)), ("id",))]

    @cached_property
    def vectors_ND(self) -> Floats:
        """The vectors of the scenes."""
        return np.concatenate(self.store.vectors("image")).astype(np.float32)

    def truth(self, holds: Callable[[Scene], bool]) -> Bools:
        """Return for which scenes (N,) something holds."""
        return np.array([holds(scene) for scene in self.scenes_N])


def drawn(folder: Path, *, minutes: float, scenes: int, held_out: int) -> Drawn:
    """Draw, train, embed and index in a folder, unless it was done there before."""
    folder.mkdir(parents=True, exist_ok=True)
    done, run, store = folder / "done.json", folder / "run", folder / "scenes.store"
    if not done.exists():
        started = time.monotonic()
        training, unseen = folder / "training.tar", folder / "unseen.tar"
        write(training, scenes, TRAINING_SEED, captions="short")
        write(unseen, held_out, SEED, captions="complete")
        config = TrainConfig(
            preset="nano", caption_keys=KEYS, minutes=minutes, captions_per_image=4,
            learning_rate=2e-3, validations=2, caption_loss=0.5, batch_size=256, weight_decay=0.2,
            start_size=1.0,
            augment=Augment(crop_min=0.85, aspect=1.05, colour=0.1, erase=0.0),
        )  # fmt: skip
        passes = train([str(training)], run, config)["epoch"]
        embed(run, [str(unseen)], store, caption_keys=KEYS)
        build_index(store)
        took = round(time.monotonic() - started)
        done.write_text(json.dumps({"passes": round(passes, 2), "seconds": took}))
    opened = open_store(store)
    return Drawn(folder, opened, model_of(opened, None))


def parser(name: str) -> argparse.ArgumentParser:
    """Return the arguments of a benchmark on drawn scenes; `world` reads them."""
    made = argparse.ArgumentParser(prog=f"bench {name}")
    made.add_argument("folder", type=Path)
    made.add_argument("--minutes", type=float, default=6.5)
    made.add_argument("--scenes", type=int, default=9_000)
    made.add_argument("--held-out", type=int, default=3_000)
    return made


def world(options: argparse.Namespace) -> Drawn:
    """Return what the arguments of a benchmark ask for."""
    return drawn(
        options.folder, minutes=options.minutes, scenes=options.scenes, held_out=options.held_out
    )
