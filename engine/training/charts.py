"""Small charts as SVG text, for pages that must work offline, on a phone, in light and in dark.

Colours are CSS variables (`--ink`, `--grid`, `--a`, `--b`, ...) that the page sets; every text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 240
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 12, 44
ROW = 44
SERIES = ("a", "b", "c", "d", "e", "f")


@dataclass(frozen=True)
class Series:
    """A named line; points without a finite y are left out. `dots`: marks, with no line between."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    dots: bool = False


def line_chart(
    series: Sequence[Series], x_label: str, y_label: str, *, diagonal: bool = False, whole_x: bool = False
) -> str:
    """Lines over a common pair of axes. diagonal: the line of perfect calibration; whole_x: ticks at integers."""
    points = [_points(s) for s in series]
    flat = [p for some in points for p in some]
    if not flat:
        return _frame("", "nothing to show")
    xs, ys = _span([p[0] for p in flat]), _span([p[1] for p in flat])
    if diagonal:
        xs = ys = (min(0.0, xs[0]), max(xs[1], ys[1]))
    x_ticks, y_ticks = _ticks(*xs, whole=whole_x), _ticks(*ys)
    ys = (min(ys[0], y_ticks[0]), max(ys[1], y_ticks[-1]))
    parts = [_axes(xs, ys, x_ticks, y_ticks, x_label, y_label)]
    if diagonal:
        low, high = max(xs[0], ys[0]), min(xs[1], ys[1])
        a, b = (_at(low, xs, 0), _at(low, ys, 1)), (_at(high, xs, 0), _at(high, ys, 1))
        parts.append(f'<path class="guide" d="M{a[0]:.1f} {a[1]:.1f}L{b[0]:.1f} {b[1]:.1f}"/>')
    for number, (one, some) in enumerate(zip(series, points, strict=True)):
        colour = f"var(--{SERIES[number % len(SERIES)]})"
        where = [(_at(x, xs, 0), _at(y, ys, 1)) for x, y in some]
        if not one.dots and len(where) > 1:
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in where)
            parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, y), (raw_x, raw_y) in zip(where, some, strict=True):
            label = escape(f"{one.name}: {x_label} {_number(raw_x)}, {y_label} {_number(raw_y)}")
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"><title>{label}</title></circle>')
    return _frame("".join(parts), f"{y_label} by {x_label}") + _legend([s.name for s in series])


def bar_chart(names: Sequence[str], values: Sequence[float | None], y_label: str, *, guide: float | None = None) -> str:
    """One bar a name, from zero or from the height `guide` (chance, say), which is marked; None leaves a gap."""
    floor = 0.0 if guide is None else guide
    shown = [v for v in values if v is not None and math.isfinite(v)]
    if not shown:
        return _frame("", "nothing to show")
    low, high = min(floor, *shown), max(floor, *shown)
    pad = (high - low) * 0.15 or 1.0
    ys = (low - pad if low < floor else low, high + pad)
    parts = [_axes((0, 1), ys, [], _ticks(*ys), "", y_label)]
    slot = (WIDTH - LEFT - RIGHT) / len(names)
    base = _at(floor, ys, 1)
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        middle = LEFT + slot * (i + 0.5)
        parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(name)}</text>')
        if value is None or not math.isfinite(value):
            continue
        end = _at(value, ys, 1)
        label = escape(f"{name}: {y_label} {_number(value)}")
        half = min(slot * 0.34, 28)
        parts.append(
            f'<rect x="{middle - half:.1f}" y="{min(end, base):.1f}" width="{2 * half:.1f}" '
            f'height="{abs(base - end):.1f}" fill="var(--a)"><title>{label}</title></rect>'
        )
        if slot >= 44:  # narrower bars have their number in the tooltip only
            parts.append(
                f'<text x="{middle:.1f}" y="{min(end, base) - 5:.1f}" text-anchor="middle">{_number(value)}</text>'
            )
    if guide is not None:
        parts.append(f'<path class="guide" d="M{LEFT} {base:.1f}H{WIDTH - RIGHT}"/>')
    return _frame("".join(parts), y_label)


def row_chart(
    names: Sequence[str],
    values: Sequence[float | None],
    x_label: str,
    *,
    errors: Sequence[float | None] | None = None,
) -> str:
    """One row a name with a dot and a whisker of `errors` to both sides; for any number of names of any length."""
    spread = [e or 0.0 for e in errors] if errors else [0.0] * len(names)
    known = [(v, e) for v, e in zip(values, spread, strict=True) if v is not None and math.isfinite(v)]
    if not known:
        return _frame("", "nothing to show")
    low, high = _span([v - e for v, e in known] + [v + e for v, e in known])
    xs = (low - 0.06 * (high - low), high + 0.06 * (high - low))
    height, left = ROW * len(names) + BOTTOM, 14
    floor, width = height - BOTTOM, WIDTH - RIGHT - left
    parts = []
    for tick in _ticks(*xs, about=4):
        x = left + (tick - xs[0]) / (xs[1] - xs[0]) * width
        parts.append(f'<path class="grid" d="M{x:.1f} 0V{floor}"/>')
        parts.append(f'<text x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{_number(tick)}</text>')
    for i, (name, value, error) in enumerate(zip(names, values, spread, strict=True)):
        y = ROW * i + 30
        figure = "–" if value is None or not math.isfinite(value) else _number(value)
        parts.append(f'<text x="{left}" y="{y - 12}">{escape(name)}</text>')
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{y - 12}" text-anchor="end">{figure}</text>')
        if value is None or not math.isfinite(value):
            continue
        x, reach = left + (value - xs[0]) / (xs[1] - xs[0]) * width, error / (xs[1] - xs[0]) * width
        parts.append(f'<path class="whisker" d="M{x - reach:.1f} {y}H{x + reach:.1f}"/>')
        label = escape(f"{name}: {x_label} {figure}" + (f" ± {_number(error)}" if error else ""))
        parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="5" fill="var(--a)"><title>{label}</title></circle>')
    parts.append(f'<path class="axis" d="M{left} {floor}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text x="{WIDTH / 2}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>')
    return _frame("".join(parts), x_label, height)


def standalone(charts: Sequence[tuple[str, str]]) -> str:
    """(title, chart) pairs under one another as one SVG file, in light or dark as the viewer prefers."""
    parts, top = [], 0
    for title, chart in charts:
        opening, body = chart[: chart.rindex("</svg>")].split(">", 1)
        heading = f'<text x="14" y="16" font-weight="600">{escape(title)}</text>'
        parts.append(f'<g transform="translate(0 {top})">{heading}<g transform="translate(0 24)">{body}</g></g>')
        top += 30 + int(opening.split('viewBox="0 0 ', 1)[1].split('"')[0].split()[1])
    size = f'viewBox="0 0 {WIDTH} {top}" width="{2 * WIDTH}" height="{2 * top}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{_STYLE}</style>'
        f'<rect width="100%" height="100%" fill="var(--paper)"/>{"".join(parts)}</svg>\n'
    )


_STYLE = (
    ":root{--paper:#fff;--ink:#1d2430;--soft:#5b6678;--grid:#e3e7ee;--a:#2563c9;--b:#c2410c;--c:#0f8a6a}"
    "@media(prefers-color-scheme:dark){:root{--paper:#12161d;--ink:#e6eaf1;--soft:#98a4b8;--grid:#2a3342;--a:#6ea3ff;"
    "--b:#ff9a62;--c:#4fd0a9}}text{font:12px system-ui,sans-serif;fill:var(--soft)}.grid{stroke:var(--grid)}"
    ".axis{stroke:var(--soft);fill:none}.guide{stroke:var(--soft);stroke-dasharray:4 4;fill:none}"
    ".whisker{stroke:var(--ink);stroke-width:1.5}"
)


# ---------------------------------------------------------------------------------------------- helpers
def _points(series: Series) -> list[tuple[float, float]]:
    pairs = [(float(x), float(y)) for x, y in zip(series.x, series.y, strict=True) if y is not None]
    return [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]


def _frame(body: str, label: str, height: int = HEIGHT) -> str:
    inside = body or f'<text x="{WIDTH / 2}" y="{height / 2}" text-anchor="middle">{escape(label)}</text>'
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{inside}</svg>'


def _legend(names: Sequence[str]) -> str:
    keys = "".join(
        f'<span><i style="background:var(--{SERIES[n % len(SERIES)]})"></i>{escape(name)}</span>'
        for n, name in enumerate(names)
    )
    return f'<p class="legend">{keys}</p>'


def _axes(
    xs: tuple[float, float],
    ys: tuple[float, float],
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_label: str,
    y_label: str,
) -> str:
    parts = []
    for tick in y_ticks:
        y = _at(tick, ys, 1)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in x_ticks:
        x = _at(tick, xs, 0)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_number(tick)}</text>')
    floor = HEIGHT - BOTTOM
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{floor}H{WIDTH - RIGHT}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    height = (TOP + floor) / 2
    turned = f'transform="rotate(-90 11 {height})"'
    parts.append(f'<text x="11" y="{height}" text-anchor="middle" {turned}>{escape(y_label)}</text>')
    return "".join(parts)


def _at(value: float, span: tuple[float, float], axis: int) -> float:
    """A value's place in pixels on the x axis (0) or the y axis (1)."""
    share = (value - span[0]) / (span[1] - span[0])
    if axis == 0:
        return LEFT + share * (WIDTH - LEFT - RIGHT)
    return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        pad = abs(low) * 0.05 or 1.0
        return low - pad, high + pad
    return low, high


def _ticks(low: float, high: float, *, whole: bool = False, about: int = 5) -> list[float]:
    """Round numbers between two bounds, about five."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    step = max(1.0, round(step)) if whole else step
    first = math.ceil(low / step - 1e-9)
    ticks = [round(n * step, 10) for n in range(first, math.floor(high / step + 1e-9) + 1)]
    return ticks or [low, high]


def _number(value: float) -> str:
    """Four figures at most, no needless zeros."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.1e}"
