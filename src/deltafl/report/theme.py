"""Colours and type of charts and page: one set for light, one for dark.

Charts are drawn in the light colours. In the page each of them becomes a CSS variable with the light colour as its
fallback, so an inlined chart follows the reader's theme and the same SVG stands on its own.

The categories are Okabe and Ito's colour-blind-safe hues (jfly.uni-koeln.de/color), the two lightest darkened until
every one has a contrast of at least 3:1 to the background, in both themes.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tone:
    """One colour by its role, in both themes."""

    light: str
    dark: str


TONES: dict[str, Tone] = {
    "paper": Tone("#fefefe", "#12171d"),
    "card": Tone("#f4f6f8", "#1b222a"),
    "ink": Tone("#1a2129", "#e7ecf1"),
    "muted": Tone("#566270", "#a3afbb"),
    "line": Tone("#d9dee4", "#36404b"),
    "shade": Tone("#c3cad2", "#4a5663"),
    "accent": Tone("#0b5fa5", "#7cc0f8"),
    "series-1": Tone("#0072b2", "#4b9fe6"),
    "series-2": Tone("#d55e00", "#ff8a50"),
    "series-3": Tone("#009270", "#35c79e"),
    "series-4": Tone("#c2558f", "#eb9cc8"),
    "series-5": Tone("#bb7d00", "#f2bd4a"),
    "series-6": Tone("#3598d0", "#a5dcff"),
    "reference-1": Tone("#6b7682", "#a9b4bf"),
    "reference-2": Tone("#a9b2bc", "#5d6874"),
    "positive": Tone("#0a67ad", "#62b4f5"),
    "negative": Tone("#c24f04", "#ff9560"),
    "on-fill": Tone("#fdfdfd", "#0d1217"),
}

INK, MUTED, LINE, PAPER, ON_FILL = (
    TONES[role].light for role in ("ink", "muted", "line", "paper", "on-fill")
)
POSITIVE, NEGATIVE = TONES["positive"].light, TONES["negative"].light
SERIES = tuple(tone.light for role, tone in TONES.items() if role.startswith("series-"))
REFERENCE = tuple(tone.light for role, tone in TONES.items() if role.startswith("reference-"))
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p")
DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)))


def css_variables(theme: str) -> str:
    """The tones of "light" or "dark" as CSS declarations."""
    return "".join(f"--{role}:{getattr(tone, theme)};" for role, tone in TONES.items())


def follow_theme(svg: str) -> str:
    """`svg` with every known colour replaced by its CSS variable, the colour itself as fallback."""
    for role, tone in TONES.items():
        svg = svg.replace(f": {tone.light}", f": var(--{role},{tone.light})")
    return svg
