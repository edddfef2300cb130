"""Colours of charts and page by their role: one tone for light, one for dark.

Charts are drawn in the light tones; the page's style sheet turns each into its role, so that an inlined chart follows
the reader's theme and the same SVG stands on its own. Cells of heat maps keep one colour, which is strong on both.

The series are Okabe and Ito's colour-blind-safe hues (jfly.uni-koeln.de/color), purple, brown and olive for those that
are too light, darkened until every one has a contrast of at least 3:1 to the background, in both themes.
"""

from typing import NamedTuple


class Tone(NamedTuple):
    """One colour in both themes."""

    light: str
    dark: str


TONES = {
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
    "series-6": Tone("#6f4fc0", "#b39cf5"),
    "series-7": Tone("#8a4a2c", "#cf9b7e"),
    "series-8": Tone("#758400", "#c5d65b"),
}
PAPER, INK, MUTED = (TONES[role].light for role in ("paper", "ink", "muted"))
SERIES = [tone.light for role, tone in TONES.items() if role.startswith("series")]
FILLS = ("#2272b9", "#bf560b")
"""Of heat maps, above and below neutral, in both themes; white is legible on them."""
