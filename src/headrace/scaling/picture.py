"""Workers against load over time, as text for a terminal and as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from html import escape

import numpy as np
from numpy.typing import NDArray

from headrace.scaling.arrivals import TICK, Arrivals, Floats
from headrace.scaling.simulation import Outcome

_BLOCKS = " ▁▂▃▄▅▆▇█"
_WIDTH, _HEIGHT, _MARGIN = 960, 240, 48
_COLOURS = ("#c2410c", "#2563eb", "#059669", "#7c3aed", "#b45309", "#475569")


def in_terminal(arrivals: Arrivals, mu: float, outcome: Outcome, width: int = 72, height: int = 8) -> str:
    """Return the arrivals as bars, in workers that they keep busy, and the workers as a line over them.

    One column is the mean of the load and the most workers within its time.
    """
    load, workers = _columns(arrivals, mu, outcome, width)
    top = max(float(workers.max()), float(load.max()), 1.0)
    lines = []
    for row in range(height, 0, -1):
        floor, unit = top * (row - 1) / height, top / height
        cells = []
        for busy, there in zip(load, workers, strict=True):
            full = min(1.0, max(0.0, (busy - floor) / unit))
            is_line = floor < there <= floor + unit or (row == 1 and there == 0)
            cells.append("─" if is_line else _BLOCKS[round(full * 8)])
        lines.append(f"{top * row / height:6.1f} ┤{''.join(cells)}".rstrip())
    end = arrivals.start + timedelta(seconds=arrivals.seconds)
    begin, last = f"{arrivals.start:%Y-%m-%d %H:%M}", f"{end:%Y-%m-%d %H:%M}"
    lines.append(f"{'':7}└{begin}{last:>{max(1, len(load) - len(begin))}}")
    lines.append(f"{'':8}─ workers of {outcome.policy}   █ workers that the arrivals keep busy")
    return "\n".join(lines)


def as_svg(arrivals: Arrivals, mu: float, outcomes: Sequence[Outcome]) -> str:
    """Return the arrivals as an area, and the workers of each outcome as a line of its own, one below the
    other."""
    panels = [
        _panel(arrivals, mu, outcome, i * (_HEIGHT + _MARGIN), _COLOURS[i % len(_COLOURS)])
        for i, outcome in enumerate(outcomes)
    ]
    height = len(outcomes) * (_HEIGHT + _MARGIN) + _MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH + 2 * _MARGIN} {height}" '
            'font-family="system-ui, sans-serif" font-size="12">',
            '<rect width="100%" height="100%" fill="white"/>',
            *panels,
            "</svg>\n",
        ]
    )


def _panel(arrivals: Arrivals, mu: float, outcome: Outcome, down: int, colour: str) -> str:
    load, workers = _columns(arrivals, mu, outcome, _WIDTH // 2)
    top = max(float(workers.max()), float(load.max()), 1.0)

    def place(values: Floats | NDArray[np.int32]) -> list[str]:
        return [
            f"{i * _WIDTH / len(load):.1f},{_HEIGHT * (1 - value / top):.1f}"
            for i, value in enumerate(values)
        ]

    area = " ".join(["0," + str(_HEIGHT), *place(load), f"{_WIDTH},{_HEIGHT}"])
    steps = " ".join(place(workers))
    title = (
        f"{outcome.policy}: {outcome.worker_hours:,.1f} worker-hours ({outcome.ratio:.2f} times the bound), "
        f"{outcome.minutes_over:,.1f} minutes over target, {outcome.actions_per_day:,.0f} changes a day"
    )
    return "\n".join(
        [
            f'<g transform="translate({_MARGIN},{down + _MARGIN})">',
            f"<title>{escape(title)}</title>",
            f'<text x="0" y="-8">{escape(title)}</text>',
            f'<polygon points="{area}" fill="#cbd5e1"/>',
            f'<polyline points="{steps}" fill="none" stroke="{colour}" stroke-width="1.5"/>',
            f'<line x1="0" y1="{_HEIGHT}" x2="{_WIDTH}" y2="{_HEIGHT}" stroke="#334155"/>',
            f'<text x="-8" y="8" text-anchor="end">{top:.0f}</text>',
            f'<text x="-8" y="{_HEIGHT}" text-anchor="end">0</text>',
            *_dates(arrivals),
            "</g>",
        ]
    )


def _dates(arrivals: Arrivals) -> list[str]:
    texts = []
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        moment: datetime = arrivals.start + timedelta(seconds=arrivals.seconds * share)
        place = f'x="{_WIDTH * share:.0f}" y="{_HEIGHT + 16}" text-anchor="{anchor}" fill="#475569"'
        texts.append(f"<text {place}>{moment:%Y-%m-%d %H:%M}</text>")
    return texts


def _columns(arrivals: Arrivals, mu: float, outcome: Outcome, width: int) -> tuple[Floats, NDArray[np.int32]]:
    """Return load and workers in at most `width` columns of equal time."""
    ticks = len(arrivals.rows)
    starts = np.unique(np.linspace(0, ticks, min(width, ticks), endpoint=False).astype(np.int64))
    counts = np.diff(np.append(starts, ticks))
    load = np.add.reduceat(arrivals.rows, starts) / counts / TICK / mu
    return load, np.maximum.reduceat(outcome.workers, starts)
