"""Draw procedural scenes with compositional captions in English and Chinese.

A scene shows two groups of shapes. Each group has a shape, a colour, a texture, a size and a count,
and one is left of, right of, above or below the other. Every caption states all of this, so that
finding a scene among a thousand needs every word.
"""

import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE = 96
SUPERSAMPLE = 2
Point = tuple[float, float]


@dataclass(frozen=True)
class Word:
    """One concept in two languages."""

    en: str
    zh: str


SHAPES = {
    "circle": Word("circle", "圆形"),
    "square": Word("square", "正方形"),
    "triangle": Word("triangle", "三角形"),
    "star": Word("star", "星形"),
    "heart": Word("heart", "心形"),
    "hexagon": Word("hexagon", "六边形"),
    "cross": Word("cross", "十字形"),
    "moon": Word("moon", "月牙"),
}
COLOURS: dict[str, tuple[Word, tuple[int, int, int]]] = {
    "red": (Word("red", "红色"), (214, 52, 50)),
    "orange": (Word("orange", "橙色"), (240, 140, 30)),
    "yellow": (Word("yellow", "黄色"), (238, 203, 40)),
    "green": (Word("green", "绿色"), (58, 160, 74)),
    "blue": (Word("blue", "蓝色"), (50, 98, 210)),
    "purple": (Word("purple", "紫色"), (138, 70, 180)),
    "pink": (Word("pink", "粉色"), (240, 130, 175)),
    "black": (Word("black", "黑色"), (42, 42, 46)),
}
TEXTURES = {
    "solid": Word("solid", "实心"),
    "striped": Word("striped", "条纹"),
    "dotted": Word("dotted", "圆点"),
    "hollow": Word("hollow", "空心"),
}
SIZES = {"small": Word("small", "小"), "large": Word("large", "大")}
COUNTS = {1: Word("a", "一个"), 2: Word("two", "两个"), 3: Word("three", "三个")}
# The position of the first group relative to the second.
PLACES = {
    "left": (Word("to the left of", "左边"), "right"),
    "right": (Word("to the right of", "右边"), "left"),
    "above": (Word("above", "上面"), "below"),
    "below": (Word("below", "下面"), "above"),
}
RADIUS = {"small": 0.085, "large": 0.15}


@dataclass(frozen=True)
class Group:
    """A group of identical shapes."""

    shape: str
    colour: str
    texture: str
    size: str
    count: int

    def en(self) -> str:
        """The group in English: `two small red striped stars`."""
        noun = SHAPES[self.shape].en
        if self.count > 1:
            noun += "es" if noun.endswith("s") else "s"
        return f"{COUNTS[self.count].en} {self.size} {self.colour} {self.texture} {noun}"

    def zh(self) -> str:
        """The group in Chinese: `两个小的红色条纹星形`."""
        colour, texture = COLOURS[self.colour][0].zh, TEXTURES[self.texture].zh
        size, shape = SIZES[self.size].zh, SHAPES[self.shape].zh
        return f"{COUNTS[self.count].zh}{size}的{colour}{texture}{shape}"


@dataclass(frozen=True)
class Scene:
    """Two groups and the position of the first."""

    first: Group
    second: Group
    place: str

    def captions(self) -> list[str]:
        """Four English descriptions, each complete."""
        a, b = self.first.en(), self.second.en()
        there, back = (PLACES[p][0].en for p in (self.place, PLACES[self.place][1]))
        return [
            f"{a} {there} {b}",
            f"{b} {back} {a}",
            f"a picture of {a} and, {back} {'them' if self.first.count > 1 else 'it'}, {b}",
            f"{there} {b} {'there are' if self.first.count > 1 else 'there is'} {a}",
        ]

    def captions_zh(self) -> list[str]:
        """Four Chinese descriptions, each complete."""
        a, b = self.first.zh(), self.second.zh()
        there, back = (PLACES[p][0].zh for p in (self.place, PLACES[self.place][1]))
        return [
            f"{a}在{b}的{there}",
            f"{b}在{a}的{back}",
            f"图中有{a}，它的{back}是{b}",
            f"{b}的{there}有{a}",
        ]


def random_scene(rng: np.random.Generator) -> Scene:
    """Draw the attributes of a scene at random; the two groups differ in shape or colour."""

    def pick(names: Iterable[str]) -> str:
        return str(rng.choice(list(names)))

    def group() -> Group:
        return Group(
            pick(SHAPES), pick(COLOURS), pick(TEXTURES), pick(SIZES), int(rng.integers(1, 4))
        )

    first, second = group(), group()
    while (first.shape, first.colour) == (second.shape, second.colour):
        second = group()
    return Scene(first, second, pick(PLACES))


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draw a scene; position, rotation, tint and background vary randomly."""
    side = SIDE * SUPERSAMPLE
    background = tuple(int(v) for v in rng.integers(218, 253, size=3))
    canvas = Image.new("RGB", (side, side), background)
    for group, centre in zip((scene.first, scene.second), _centres(scene.place), strict=True):
        across = scene.place in ("above", "below")
        for spot in _spots(group, centre, across=across, rng=rng):
            _paint(canvas, group, spot, rng)
    return canvas.resize((SIDE, SIDE), Image.Resampling.BOX)


def sample(seed: int, number: int) -> dict[str, object]:
    """Return scene `number` of a series as a WebDataset sample."""
    rng = np.random.default_rng((seed, number))
    scene = random_scene(rng)
    out = io.BytesIO()
    draw(scene, rng).save(out, "PNG")
    captions, chinese = scene.captions(), scene.captions_zh()
    return {
        "__key__": f"{number:06d}",
        "png": out.getvalue(),
        "txt": captions[0],
        "json": {"captions": captions, "captions_zh": chinese},
    }


def write_scenes(tar: Path, count: int, seed: int, tick: Callable[[], object]) -> None:
    """Write `count` scenes as a WebDataset tar, calling `tick` after each."""
    from webdataset import TarWriter

    with TarWriter(str(tar), encoder=True) as writer:
        for number in range(count):
            writer.write(sample(seed, number))
            tick()


def _centres(place: str) -> tuple[Point, Point]:
    near, far = 0.26, 0.74
    return {
        "left": ((near, 0.5), (far, 0.5)),
        "right": ((far, 0.5), (near, 0.5)),
        "above": ((0.5, near), (0.5, far)),
        "below": ((0.5, far), (0.5, near)),
    }[place]


def _spots(group: Group, centre: Point, *, across: bool, rng: np.random.Generator) -> list[Point]:
    """Place the shapes of a group in a loose line along its half of the picture."""
    spots = []
    for i in range(group.count):
        along = (i - (group.count - 1) / 2) * 0.31 + rng.uniform(-0.02, 0.02)
        aside = rng.uniform(-0.05, 0.05)
        dx, dy = (along, aside) if across else (aside, along)
        spots.append((centre[0] + dx, centre[1] + dy))
    return spots


def _paint(canvas: Image.Image, group: Group, spot: Point, rng: np.random.Generator) -> None:
    side = canvas.width
    radius = RADIUS[group.size] * rng.uniform(0.92, 1.08) * side
    turn = math.radians(rng.uniform(-12, 12))
    x, y = spot[0] * side, spot[1] * side
    tint = np.array(COLOURS[group.colour][1]) + rng.integers(-12, 13, size=3)
    colour = tuple(int(v) for v in tint.clip(0, 255))
    points = [
        (
            x + radius * (px * math.cos(turn) - py * math.sin(turn)),
            y + radius * (px * math.sin(turn) + py * math.cos(turn)),
        )
        for px, py in OUTLINES[group.shape]
    ]
    pen = ImageDraw.Draw(canvas)
    if group.texture == "hollow":
        pen.polygon(points, outline=colour, width=max(3, round(radius * 0.2)))
        return
    if group.texture == "solid":
        pen.polygon(points, fill=colour)
        return
    # A light shape overlaid with the pattern, clipped to the outline.
    mask = Image.new("L", canvas.size, 0)
    ImageDraw.Draw(mask).polygon(points, fill=255)
    pattern = Image.new("RGB", canvas.size, tuple(int(v + (255 - v) * 0.72) for v in colour))
    brush = ImageDraw.Draw(pattern)
    pitch = 13
    left, top = int(x - 1.5 * radius), int(y - 1.5 * radius)
    reach = int(3 * radius)
    if group.texture == "striped":
        for offset in range(-reach, reach, pitch):
            brush.line(
                [(left + offset, top + reach), (left + offset + reach, top)], colour, pitch // 2
            )
    else:
        for row in range(0, reach, pitch):
            for column in range(0, reach, pitch):
                cx, cy = left + column, top + row
                brush.ellipse([cx, cy, cx + pitch * 0.6, cy + pitch * 0.6], fill=colour)
    canvas.paste(pattern, mask=mask)
    pen.polygon(points, outline=colour, width=SUPERSAMPLE)


def _ring(count: int, start: float = -90.0, radius: float = 1.0) -> list[Point]:
    angles = [math.radians(start + 360 * i / count) for i in range(count)]
    return [(radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _star() -> list[Point]:
    outer, inner = _ring(5, radius=1.12), _ring(5, start=-54, radius=0.46)
    return [p for pair in zip(outer, inner, strict=True) for p in pair]


def _heart() -> list[Point]:
    points = []
    for i in range(48):
        t = 2 * math.pi * i / 48
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x / 16, -(y + 2.5) / 15))
    return points


def _cross() -> list[Point]:
    a, b = 0.36, 1.0
    corners = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)]
    return corners + [(-x, -y) for x, y in corners]


def _moon() -> list[Point]:
    outer = [(math.cos(t), math.sin(t)) for t in np.linspace(math.pi * 0.28, math.pi * 1.72, 32)]
    tip = outer[0][0]
    depth = 0.75
    inner = [
        (tip - depth * math.cos(s), outer[-1][1] * math.sin(s))
        for s in np.linspace(math.pi / 2, -math.pi / 2, 20)
    ]
    return outer + inner


OUTLINES: dict[str, list[Point]] = {
    "circle": _ring(40),
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": _ring(3, radius=1.12),
    "star": _star(),
    "heart": _heart(),
    "hexagon": _ring(6, start=0),
    "cross": _cross(),
    "moon": _moon(),
}
