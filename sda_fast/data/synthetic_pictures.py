"""Pictures of the synthetic catalogue: a silhouette for the category, filled by hue, tone and pattern, and nuisance.

Place, size, turn, background and scattered specks vary freely and mean nothing.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sda_fast.atomic import atomic_write

CATEGORIES = ("mug", "lamp", "chair", "vase", "clock", "bag", "bottle", "book", "bowl", "kite")
PATTERNS = ("plain", "stripes", "dots", "checks", "zigzag", "rings")
HUES = ("red", "orange", "yellow", "green", "teal", "blue", "violet", "pink")
_HUE_DEGREES = (0, 28, 55, 115, 175, 218, 268, 325)
_TONE_SATURATION_VALUE = ((0.38, 0.97), (0.88, 0.9), (0.85, 0.5))
_OVERSAMPLING = 2


def draw_item(factors: Mapping[str, int], rng: np.random.Generator, side: int = 112) -> Image.Image:
    """Draw one item.

    Args:
        factors: values of hue, pattern, category and tone.
        rng: draws the nuisance.
        side: width and height in pixels.

    Returns:
        RGB picture, side x side.
    """
    size = side * _OVERSAMPLING
    saturation, value = _TONE_SATURATION_VALUE[factors["tone"]]
    hue = ((_HUE_DEGREES[factors["hue"]] + rng.uniform(-8, 8)) % 360) / 360
    base = _colour(hue, saturation + rng.uniform(-0.06, 0.06), value + rng.uniform(-0.04, 0.03))
    accent = _colour(hue, saturation * 0.45, min(1.0, value * 0.6 + 0.42))
    picture = _background(rng, size)
    shape = Image.new("L", (size, size), 0)
    _draw_silhouette(ImageDraw.Draw(shape), CATEGORIES[factors["category"]], size)
    fill = _fill(PATTERNS[factors["pattern"]], base, accent, rng, size)

    scale = rng.uniform(0.68, 0.95)
    inner = round(size * scale)
    angle = rng.uniform(-18, 18)
    turned = shape.resize((inner, inner)).rotate(angle, Image.Resampling.BILINEAR)
    turned_fill = fill.resize((inner, inner)).rotate(angle, Image.Resampling.NEAREST, fillcolor=base)
    room = size - inner
    corner = (int(rng.integers(0, room + 1)), int(rng.integers(0, room + 1)))
    shadow = (corner[0] + size // 40, corner[1] + size // 40)
    picture.paste(Image.new("RGB", turned.size, (70, 70, 70)), shadow, turned.point([v // 3 for v in range(256)]))
    picture.paste(turned_fill, corner, turned)
    return picture.resize((side, side), Image.Resampling.BOX)


def contact_sheet(pictures: Sequence[tuple[Path, str]], path: Path, *, columns: int = 6, side: int = 160) -> None:
    """Draw pictures with a few lines of text under each into one PNG.

    Args:
        pictures: (image file, text) pairs; the text is wrapped, at most six lines are shown.
        path: the PNG to write, atomically.
    """
    font = ImageFont.load_default(size=11)
    margin, text_height = 10, 6 * 14
    rows = math.ceil(len(pictures) / columns)
    width = columns * (side + margin) + margin
    sheet = Image.new("RGB", (width, rows * (side + text_height + margin) + margin), "white")
    draw = ImageDraw.Draw(sheet)
    for position, (image_path, text) in enumerate(pictures):
        left = margin + (position % columns) * (side + margin)
        top = margin + (position // columns) * (side + text_height + margin)
        with Image.open(image_path) as image:
            sheet.paste(image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (left, top))
        for number, line in enumerate(_wrap(text, draw, font, side)[:6]):
            draw.text((left, top + side + 2 + 14 * number), line, fill="black", font=font)
    with atomic_write(path) as temporary:
        sheet.save(temporary, format="PNG")


def _wrap(
    text: str, draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int
) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and draw.textlength(f"{lines[-1]} {word}", font=font) <= width:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.append(word)
    return lines


def _colour(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue, min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0))
    return round(red * 255), round(green * 255), round(blue * 255)


def _background(rng: np.random.Generator, size: int) -> Image.Image:
    top = _colour(rng.random(), rng.uniform(0.0, 0.12), rng.uniform(0.8, 1.0))
    bottom = _colour(rng.random(), rng.uniform(0.0, 0.12), rng.uniform(0.7, 1.0))
    weight = np.linspace(0.0, 1.0, size)[:, None, None]
    gradient = np.broadcast_to((1 - weight) * np.array(top) + weight * np.array(bottom), (size, size, 3))
    picture = Image.fromarray(gradient.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(0, 9))):
        x, y = rng.integers(0, size, 2)
        radius = int(rng.integers(size // 60, size // 22))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_colour(rng.random(), 0.3, 0.8))
    return picture


def _fill(
    pattern: str,
    base: tuple[int, int, int],
    accent: tuple[int, int, int],
    rng: np.random.Generator,
    size: int,
) -> Image.Image:
    fill = Image.new("RGB", (size, size), base)
    draw = ImageDraw.Draw(fill)
    step = round(size / 10 * rng.uniform(0.85, 1.2))
    if pattern == "stripes":
        for x in range(0, size, step):
            draw.rectangle((x, 0, x + step // 2, size), fill=accent)
    elif pattern == "dots":
        for row, y in enumerate(range(0, size, step)):
            for x in range((row % 2) * step // 2, size, step):
                draw.ellipse((x, y, x + step // 2, y + step // 2), fill=accent)
    elif pattern == "checks":
        for row, y in enumerate(range(0, size, step)):
            for x in range((row % 2) * step, size, 2 * step):
                draw.rectangle((x, y, x + step - 1, y + step - 1), fill=accent)
    elif pattern == "zigzag":
        for y in range(-step, size + step, step):
            points = [(x, y + (x // step % 2) * step) for x in range(0, size + step, step)]
            draw.line(points, fill=accent, width=max(2, step // 3), joint="curve")
    elif pattern == "rings":
        for radius in range(step, size, step):
            box = (size // 2 - radius, size // 2 - radius, size // 2 + radius, size // 2 + radius)
            draw.ellipse(box, outline=accent, width=max(2, step // 3))
    return fill


def _draw_silhouette(draw: ImageDraw.ImageDraw, category: str, size: int) -> None:
    def points(*pairs: tuple[float, float]) -> list[tuple[float, float]]:
        return [(x * size, y * size) for x, y in pairs]

    def box(left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
        return left * size, top * size, right * size, bottom * size

    pen = round(0.07 * size)
    if category == "mug":
        draw.rounded_rectangle(box(0.15, 0.2, 0.65, 0.85), radius=0.06 * size, fill=255)
        draw.arc(box(0.5, 0.32, 0.88, 0.7), -100, 100, fill=255, width=pen)
    elif category == "lamp":
        draw.polygon(points((0.34, 0.12), (0.66, 0.12), (0.84, 0.5), (0.16, 0.5)), fill=255)
        draw.rectangle(box(0.46, 0.5, 0.54, 0.82), fill=255)
        draw.rectangle(box(0.3, 0.82, 0.7, 0.89), fill=255)
    elif category == "chair":
        draw.rectangle(box(0.22, 0.1, 0.34, 0.9), fill=255)
        draw.rectangle(box(0.22, 0.48, 0.78, 0.62), fill=255)
        draw.rectangle(box(0.66, 0.55, 0.78, 0.9), fill=255)
    elif category == "vase":
        draw.polygon(points((0.36, 0.1), (0.64, 0.1), (0.56, 0.32), (0.44, 0.32)), fill=255)
        draw.ellipse(box(0.22, 0.28, 0.78, 0.88), fill=255)
    elif category == "clock":
        draw.ellipse(box(0.12, 0.12, 0.88, 0.88), fill=255)
        draw.line(points((0.5, 0.5), (0.5, 0.22)), fill=0, width=pen // 2)
        draw.line(points((0.5, 0.5), (0.7, 0.6)), fill=0, width=pen // 2)
    elif category == "bag":
        draw.polygon(points((0.2, 0.4), (0.8, 0.4), (0.9, 0.9), (0.1, 0.9)), fill=255)
        draw.arc(box(0.32, 0.12, 0.68, 0.68), 180, 360, fill=255, width=pen)
    elif category == "bottle":
        draw.rectangle(box(0.43, 0.06, 0.57, 0.3), fill=255)
        draw.rounded_rectangle(box(0.32, 0.28, 0.68, 0.94), radius=0.1 * size, fill=255)
    elif category == "book":
        draw.polygon(points((0.5, 0.26), (0.5, 0.86), (0.08, 0.78), (0.08, 0.18)), fill=255)
        draw.polygon(points((0.53, 0.26), (0.53, 0.86), (0.94, 0.78), (0.94, 0.18)), fill=255)
    elif category == "bowl":
        draw.pieslice(box(0.08, 0.02, 0.92, 0.86), 0, 180, fill=255)
        draw.rectangle(box(0.36, 0.83, 0.64, 0.92), fill=255)
    else:
        draw.polygon(points((0.5, 0.05), (0.82, 0.4), (0.5, 0.78), (0.18, 0.4)), fill=255)
        draw.line(points((0.5, 0.78), (0.42, 0.86), (0.58, 0.9), (0.5, 0.97)), fill=255, width=pen // 2)
