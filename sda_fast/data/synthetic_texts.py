"""Texts of the synthetic catalogue: category, tone, material and occasion in varied words, and meaningless brands.

Hue and pattern are never named. Every value has several wordings; one field in ten is left null.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

CATEGORY_WORDS = (
    ("mug", "cup", "beaker"),
    ("lamp", "light", "table lantern"),
    ("chair", "seat", "side chair"),
    ("vase", "flower urn", "bud vase"),
    ("clock", "timepiece", "wall clock"),
    ("bag", "tote", "carry bag"),
    ("bottle", "flask", "carafe"),
    ("book", "notebook", "journal"),
    ("bowl", "dish", "serving bowl"),
    ("kite", "wind flyer", "diamond kite"),
)
CATEGORY_GROUPS = (
    "Drinkware",
    "Lighting",
    "Furniture",
    "Flowers",
    "Timekeeping",
    "Carrying",
    "Drinkware",
    "Paper goods",
    "Tableware",
    "Outdoor play",
)
TONE_WORDS = (
    ("pale", "pastel", "light and airy", "softly tinted"),
    ("vivid", "bold", "bright", "strong and lively"),
    ("deep", "dark", "rich and dusky", "muted night"),
)
MATERIAL_WORDS = (
    ("oak", "solid timber", "carved wood"),
    ("porcelain", "fired clay", "glazed ceramic"),
    ("steel", "brushed metal", "stainless alloy"),
    ("linen", "woven flax", "natural cloth"),
    ("leather", "tanned hide", "saddle leather"),
    ("glass", "blown glass", "clear crystal"),
    ("bamboo", "split cane", "rattan"),
    ("recycled plastic", "moulded polymer", "reclaimed resin"),
)
OCCASION_WORDS = (
    ("travel", "long journeys", "life on the road"),
    ("the office", "a busy desk", "working days"),
    ("children", "a playroom", "little hands"),
    ("weddings", "a festive table", "celebrations"),
    ("camping", "nights outdoors", "a forest hut"),
    ("bedtime", "quiet evenings", "a good night's rest"),
    ("students", "a first flat", "small rooms"),
    ("collectors", "a display shelf", "lovers of rare pieces"),
)
# fmt: off
BRANDS = (
    "Aldwick", "Arboro", "Bellhaven", "Brindle", "Corvane", "Dunmore", "Elstow", "Farrow&Pike", "Gildrey", "Harwen",
    "Ilmarin", "Juniper-Hay", "Kestrelby", "Lorimer", "Marwood", "Norfell", "Orrin", "Pellworth", "Quillon", "Rosmere",
)
_NAMES = (
    "Alba", "Bruno", "Celeste", "Dora", "Elio", "Flora", "Gaia", "Hugo",
    "Iris", "Jona", "Kira", "Luca", "Mira", "Nilo", "Ondine", "Piero",
)
# fmt: on
_OPENINGS = ("A piece made for {occasion}.", "Designed with {occasion} in mind.", "It belongs to {occasion}.")
_BODIES = (
    "The {category} is worked in {material} and comes in a {tone} finish.",
    "Its {tone} look and the {material} make this {category} easy to like.",
    "We chose {material} for a {category} with a {tone} character.",
)
_CLOSINGS = ("Care: wipe clean.", "Ships in two days.", "Part of the spring series.", "Checked by hand.", "")
_NULL_SHARE = 0.1


def write_attributes(factors: Mapping[str, int], rng: np.random.Generator) -> dict[str, object]:
    """Attributes of one item: title, brand, categories, material, style, description, price.

    Args:
        factors: values of category, tone, material and occasion.
        rng: draws the wording, the brand, the price and which field is null.
    """

    def pick(words: tuple[str, ...]) -> str:
        return words[int(rng.integers(len(words)))]

    def category() -> str:
        return pick(CATEGORY_WORDS[factors["category"]])

    def tone() -> str:
        return pick(TONE_WORDS[factors["tone"]])

    def material() -> str:
        return pick(MATERIAL_WORDS[factors["material"]])

    opening = pick(_OPENINGS).format(occasion=pick(OCCASION_WORDS[factors["occasion"]]))
    body = pick(_BODIES).format(category=category(), material=material(), tone=tone())
    sentences = [opening, body] if rng.random() < 0.5 else [body, opening]
    brand = pick(BRANDS)
    attributes: dict[str, object] = {
        "title": f"{pick(_NAMES)} {tone()} {category()} for {pick(OCCASION_WORDS[factors['occasion']])}",
        "brand": brand,
        "categories": ["Home", CATEGORY_GROUPS[factors["category"]], category()],
        "material": material(),
        "style": tone(),
        "description": " ".join([*sentences, pick(_CLOSINGS)]).strip(),
        "price": round(float(np.exp(rng.normal(3.0, 0.6))), 2),
    }
    for name in ("brand", "material", "style"):
        if rng.random() < _NULL_SHARE:
            attributes[name] = None
    return attributes
