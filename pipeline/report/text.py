"""Numbers and hostile text as people read them, in the report and on the terminal."""

import math
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.judging import Comparison

DASH = "\u2013"
MINUS = "\u2212"


def plain(text: str) -> str:
    """`text` with each character that prints nothing spelled out (controls, bidirectional overrides, surrogates)."""
    composed = unicodedata.normalize("NFC", text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in composed)


def short(text: str, limit: int = 120) -> str:
    """`plain(text)`, cut in the middle to `limit` characters."""
    text = plain(text)
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[-(limit - limit // 2 - 1) :]}"


def basename(path: str) -> str:
    """The last part of a path."""
    return path.rpartition("/")[2] or path


def plotly_text(text: str) -> str:
    """`text` so that plotly, which reads a subset of HTML in labels, shows it as it stands."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def finite(value: float | None) -> float | None:
    """`value`, or None for NaN and the infinities, which JSON has no words for."""
    return value if value is not None and math.isfinite(value) else None


def percent(fraction: float | None) -> str:
    """0.8814 as "88.1%"; a dash for None and NaN."""
    return DASH if fraction is None or finite(fraction) is None else f"{100 * fraction:.1f}%"


def points(difference: float | None) -> str:
    """A difference of two fractions in percentage points, signed: 0.0421 as "+4.2"; a dash for None and NaN."""
    if difference is None or finite(difference) is None:
        return DASH
    return f"{round(100 * difference, 1) + 0.0:+.1f}".replace("-", MINUS)


def interval(bounds: tuple[float, float]) -> str:
    """Bounds of a share, in percent: "82.9–85.4"."""
    return f"{100 * bounds[0]:.1f}{DASH}{100 * bounds[1]:.1f}"


def comparison(found: "Comparison") -> str:
    """A paired comparison: "+2.1 points (95% interval −0.3 to +4.5), p = 0.09: within the noise"."""
    low, high = found.interval
    p = f"p = {found.p:.2g}" if found.p >= 0.001 else "p < 0.001"
    verdict = "within the noise" if found.p >= 0.05 else "better" if found.difference > 0 else "worse"
    return f"{points(found.difference)} points (95% interval {points(low)} to {points(high)}), {p}: {verdict}"


def score(value: float | None, decimals: int = 4) -> str:
    """A probability or a logit, to four decimals; a dash for None and NaN."""
    return DASH if value is None or finite(value) is None else f"{value:.{decimals}f}".replace("-", MINUS)


def duration(seconds: float | None) -> str:
    """Seconds as "4.2 s", "3 min 07 s" or "5 h 02 min"; a dash for None and NaN."""
    if seconds is None or finite(seconds) is None:
        return DASH
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def thousands(value: float | None) -> str:
    """A number of things, with separators: 12,345; a dash for None and NaN."""
    return DASH if value is None or finite(value) is None else f"{value:,.0f}"


def parameters(value: int) -> str:
    """A number of parameters: "25.6M", "54.3k", "812"."""
    return f"{value / 1e6:,.1f}M" if value >= 1e6 else f"{value / 1e3:.1f}k" if value >= 1e3 else str(value)
