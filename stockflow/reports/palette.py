"""The colours of the page, for light and dark: scales of even perceived lightness, made in OKLCH.

Lightness alone carries the order in both scales, so they read the same with any colour vision, and in grey.
Source of the colour space: Björn Ottosson, "A perceptual color space for image processing", 2020.
"""

import math
from collections.abc import Mapping
from typing import Literal

Theme = Literal["light", "dark"]

NUM_SEQUENTIAL = 16
NUM_DIVERGING = 15
"""odd: the middle one is zero"""

TOKENS: Mapping[str, tuple[str, str]] = {
    "ground": ("#fcfcfa", "#111519"),
    "panel": ("#ffffff", "#181d23"),
    "raised": ("#f3f4f0", "#20262d"),
    "ink": ("#181d22", "#e8ebee"),
    "muted": ("#57616b", "#9fa9b3"),
    "rule": ("#e2e4de", "#2b333b"),
    "accent": ("#08638f", "#74c6ea"),
    "wait": ("#a9b4bc", "#55616c"),
    "warn": ("#a33f0a", "#f3a36f"),
    "warn-ground": ("#fdeee4", "#34221a"),
    "good": ("#1b6e4a", "#7fd0a6"),
    "model-0": ("#08638f", "#74c6ea"),
    "model-1": ("#b0500c", "#f0a062"),
    "model-2": ("#1f7a55", "#6fcf9f"),
    "model-3": ("#8a3f86", "#dd9bd8"),
    "model-4": ("#6d6412", "#d3c65c"),
    "model-5": ("#4b5563", "#b4bec9"),
}
"""Name to its colour in light and in dark."""

TEXT_PAIRS = (
    *((text, on) for text in ("ink", "muted", "accent", "warn", "good") for on in ("ground", "panel", "raised")),
    ("ink", "warn-ground"),
    ("warn", "warn-ground"),
)
"""What is written on what; WCAG asks for a contrast of 4.5."""


def tokens(theme: Theme) -> dict[str, str]:
    """Return the colours of a theme by name."""
    return {name: pair[0 if theme == "light" else 1] for name, pair in TOKENS.items()}


def sequential(theme: Theme) -> list[str]:
    """Return the colours from low to high: high stands out from the ground."""
    scale = []
    for index in range(NUM_SEQUENTIAL):
        place = index / (NUM_SEQUENTIAL - 1)
        if theme == "light":
            scale.append(_hex(0.955 - 0.62 * place, 0.02 + 0.10 * math.sin(math.pi * 0.85 * place), 190 + 75 * place))
        else:
            scale.append(_hex(0.27 + 0.66 * place, 0.03 + 0.09 * math.sin(math.pi * place), 265 - 75 * place))
    return scale


def diverging(theme: Theme) -> list[str]:
    """Return the colours from negative (orange) over zero, which is near the ground, to positive (blue)."""
    scale = []
    middle = NUM_DIVERGING // 2
    for index in range(NUM_DIVERGING):
        place = (index - middle) / middle
        lightness = 0.95 - 0.55 * abs(place) if theme == "light" else 0.30 + 0.52 * abs(place)
        scale.append(_hex(lightness, 0.005 + 0.13 * abs(place), 245 if place > 0 else 50))
    return scale


def text_on(colour: str) -> str:
    """Return black or white, whichever is read more easily on a colour."""
    return max(("#000000", "#ffffff"), key=lambda text: contrast(text, colour))


def contrast(left: str, right: str) -> float:
    """Return the contrast ratio of WCAG 2, from 1 to 21."""
    high, low = sorted((_luminance(left), _luminance(right)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    channels = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _hex(lightness: float, chroma: float, hue: float) -> str:
    """Return an OKLCH colour as sRGB; chroma is lowered until it fits."""
    while chroma > 0.0 and not all(-1e-4 <= channel <= 1.0001 for channel in _linear(lightness, chroma, hue)):
        chroma -= 0.002
    encoded = []
    for channel in _linear(lightness, max(chroma, 0.0), hue):
        value = min(max(channel, 0.0), 1.0)
        encoded.append(12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055)
    return "#" + "".join(f"{round(255 * value):02x}" for value in encoded)


def _linear(lightness: float, chroma: float, hue: float) -> tuple[float, float, float]:
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
