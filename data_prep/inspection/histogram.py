"""Histograms as SVG for a page: a few rectangles and labels, coloured by the page's own style, light or dark."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from markupsafe import Markup, escape

from data_prep.inspection.tallies import Bin

WIDTH, HEIGHT = 420, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 8, 8, 16, 26
_TICKS = 5


def short(value: float) -> str:
    """As 1,200 or 45k or 2.5M: at most four figures."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def svg(title: str, bins: Sequence[Bin], *, shown: Callable[[float], str] = short, last_is_open: bool = True) -> Markup:
    """An <svg> as wide as its place; bars of one width, each with its range and count on hover.

    last_is_open: the last bar holds everything above its lower end. shown: how values are written.
    """
    if not bins:
        return Markup("")
    most = max(one.count for one in bins)
    step = (WIDTH - _LEFT - _RIGHT) / len(bins)
    floor = HEIGHT - _BOTTOM
    parts = [
        f'<line class="axis" x1="{_LEFT}" y1="{floor}" x2="{WIDTH - _RIGHT}" y2="{floor}"/>',
        f'<text class="label" x="{_LEFT}" y="11">most in a bar: {short(most)}</text>',
    ]
    for number, one in enumerate(bins):
        high = (floor - _TOP) * one.count / most
        # One value in a million is still seen.
        high = max(high, 1.0) if one.count else 0.0
        x = _LEFT + number * step
        ends = _ends(one, shown, is_open=last_is_open and number == len(bins) - 1 and len(bins) > 1)
        parts.append(
            f'<rect class="bar" x="{x:.1f}" y="{floor - high:.1f}" width="{max(step - 1, 0.5):.1f}" '
            f'height="{high:.1f}">'
            f"<title>{escape(ends)}: {one.count:,}</title></rect>"
        )
    for number in _tick_places(len(bins)):
        x = _LEFT + number * step
        anchor = "start" if number == 0 else "end" if number == len(bins) else "middle"
        value = bins[number].low if number < len(bins) else bins[-1].high
        parts.append(
            f'<text class="label" x="{x:.1f}" y="{HEIGHT - 9}" text-anchor="{anchor}">{escape(shown(value))}</text>'
        )
    words = escape(f"{title}: {len(bins)} bars from {shown(bins[0].low)} to {shown(bins[-1].high)}")
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{words}">' + "\n".join(parts) + "</svg>")


def _ends(one: Bin, shown: Callable[[float], str], *, is_open: bool) -> str:
    if is_open:
        return f"{shown(one.low)} and more"
    return shown(one.low) if one.high - one.low == 1 else f"{shown(one.low)} to {shown(one.high)}"


def _tick_places(bars: int) -> list[int]:
    """Bars that carry a label: the first, and evenly those up to the last, whose end would be an outlier's."""
    if bars == 1:
        return [0]
    return sorted({round(number * (bars - 1) / (_TICKS - 1)) for number in range(_TICKS)})
