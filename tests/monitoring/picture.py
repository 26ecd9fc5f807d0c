"""A dashboard as Grafana draws it in its dark theme: panels at their places, with their units, legends and thresholds.

It knows what k8s/monitoring/gpuml.json uses: stat, table, and timeseries with the legend below.
"""

import math
import re
from collections.abc import Callable
from datetime import UTC, datetime
from html import escape
from itertools import cycle, pairwise

WIDTH, MARGIN, GAP, ROW, STEP = 1280, 16, 8, 30, 60  # pixels; seconds between two points
COLORS = {"green": "#73BF69", "yellow": "#FADE2A", "blue": "#5794F2", "orange": "#FF9830", "red": "#F2495C",
          "purple": "#B877D9", "dark-green": "#37872D", "dark-yellow": "#E0B400", "dark-blue": "#1F60C4",
          "dark-orange": "#FA6400", "dark-red": "#C4162A", "dark-purple": "#8F3BB8", "super-light-green": "#C8F2C2",
          "super-light-yellow": "#FFF899", "super-light-blue": "#C0D8FF", "super-light-orange": "#FFCB7D"}  # fmt: skip
PALETTE = list(COLORS.values())  # series take them in this order
THRESHOLDS = [{"color": "green", "value": None}, {"color": "red", "value": 80}]  # where a panel has none
UNITS = {"bytes": [(1024**n, f" {name}") for n, name in enumerate(["B", "KiB", "MiB", "GiB", "TiB"])],
         "short": [(1, ""), (1e3, " K"), (1e6, " Mil")], "percentunit": [(0.01, "%")],
         "h": [(1, " hour"), (24, " day"), (168, " week")]}  # fmt: skip
STYLE = """
* { box-sizing: border-box } body { margin: 0; padding: 0 16px; background: #111217; color: #ccccdc }
body, text { font: 12px Inter, Helvetica, sans-serif } text { fill: #ccccdc } svg { display: block } main { position: relative }
header { display: flex; gap: 8px; align-items: center; height: 52px } header b { font-size: 18px; margin-right: auto }
header span { border: 1px solid #34363d; border-radius: 2px; padding: 7px 10px; background: #181b1f }
section { position: absolute; background: #181b1f; border: 1px solid #25272d; border-radius: 2px; padding: 8px; overflow: hidden }
h2 { font-size: 14px; font-weight: 500; margin: 0 0 8px; line-height: 18px }
h2 i { border: 1px solid; border-radius: 50%; font: italic 10px serif; padding: 0 5px; margin-left: 4px; opacity: .6 }
ul { margin: 6px 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0 14px; overflow: hidden }
li { white-space: nowrap; line-height: 18px; list-style: none } u { display: inline-block; width: 14px; height: 4px;
  border-radius: 2px; margin-right: 6px; vertical-align: middle } div { display: flex; height: 75% }
p { flex: 1; margin: auto; text-align: center; font-size: 14px } p b { display: block; font-size: 40px; font-weight: 500 }
table { border-collapse: collapse; width: 100% } tr { height: 36px } th { text-align: left; font-weight: 500; color: #6e9fff }
th, td { padding: 0 8px; border-bottom: 1px solid #25272d }
"""


def shown(value: float, unit: str, digits: int | None = None) -> str:
    "A value in its unit; with three digits, if it is not said how many decimals"
    size, name = [step for n, step in enumerate(UNITS[unit]) if n == 0 or step[0] <= abs(value)][-1]
    value /= size
    if digits is None:
        digits = 0 if math.isclose(value, round(value)) else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}{name}"


def series(panel: dict, ask: Callable, start: float, end: float, namespaces: str) -> list[tuple[str, dict, list]]:
    "What a panel draws: of each series its name in the legend, its labels, and [(time, value), …]"
    found = []
    for target in panel["targets"]:
        query = target["expr"].replace("$namespace", namespaces)
        if target.get("instant"):
            result = [r | {"values": [r["value"]]} for r in ask("query", query=query, time=end)]
        else:
            result = ask("query_range", query=query, start=start, end=end, step=STEP)
        for one in result:
            name = re.sub(r"{{(\w+)}}", lambda m, labels=one["metric"]: labels[m[1]], target["legendFormat"])
            found.append((name, one["metric"], [(t, float(v)) for t, v in one["values"]]))
    return found


def stat(panel: dict, found: list) -> str:
    config, parts = panel["fieldConfig"]["defaults"], []
    for name, _, points in found:
        value = points[-1][1]
        steps = config.get("thresholds", {}).get("steps", THRESHOLDS)
        color = [s["color"] for s in steps if s["value"] is None or value >= s["value"]][-1]
        title, text = escape(name) if len(found) > 1 else "", shown(value, config["unit"])
        parts.append(f'<p>{title}<b style="color:{COLORS[color]}">{text}</b></p>')
    return f"<div>{''.join(parts)}</div>"


def table(panel: dict, found: list) -> str:
    options = panel["transformations"][0]["options"]
    rows = [labels | {"Value": shown(points[-1][1], "short")} for _, labels, points in found]
    columns = {options["renameByName"][c]: c for c in sorted(rows[0], key=options["indexByName"].get)}
    rows.sort(key=lambda row: [row[columns[by["displayName"]]] for by in panel["options"]["sortBy"]])
    cells = ["".join(f"<td>{escape(row[c])}" for c in columns.values()) for row in rows]
    return f"<table><tr><th>{'<th>'.join(columns)}<tr>{'<tr>'.join(cells)}</table>"


def ticks(low: float, high: float, most: float, config: dict) -> list[tuple[float, str]]:
    "At most so many round values, and what is written beside them"
    unit, whole = config["unit"], config.get("decimals") == 0
    round_ones = [m * 10.0**n for n in range(-6, 9) for m in (1, 2, 2.5, 5)]
    steps = [2.0**n for n in range(50)] if unit == "bytes" else round_ones
    step = next(s for s in steps if s >= (high - low) / most and (not whole or s == int(s)))
    decimals = len(f"{step:.6f}".rstrip("0").partition(".")[2]) if unit in ("short", "h") else 0
    values = [step * n for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return [(v, shown(v, unit, decimals or None)) for v in values]


def legend(found: list, width: float, most: float) -> tuple[str, float]:
    "The list below the plot, and its height"
    rows, at = 1, 0.0
    for name, *_ in found:
        long = 34 + 6.7 * len(name)
        rows, at = (rows + 1, long) if at + long > width + 14 else (rows, at + long)
    items = [
        f'<li><u style="background:{color}"></u>{escape(name)}' for (name, *_), color in zip(found, cycle(PALETTE))
    ]
    height = min(18 * rows, most)
    return f'<ul style="max-height:{height}px">{"".join(items)}</ul>', height + 6


def timeseries(panel: dict, found: list, width: float, height: float, start: float, end: float) -> str:
    config = panel["fieldConfig"]["defaults"]
    custom = config.get("custom", {})
    names, below = legend(found, width, 0.35 * height)
    bottom, base, curves = height - below - 22, {}, []  # base: how high the stack is so far, at each time
    for _, _, points in found:
        lower = [(t, base.get(t, 0.0)) for t, _ in points]
        curves.append((lower, [(t, v + under) for (t, v), (_, under) in zip(points, lower)]))
        if custom.get("stacking", {}).get("mode") == "normal":
            base |= dict(curves[-1][1])
    values = [v for _, upper in curves for _, v in upper]
    pad = 0.1 * ((max(values) - min(values)) or max(values) or 1)
    low = config.get("min", max(0, min(values) - pad))
    high = config.get("max", max(max(values) + pad, custom.get("axisSoftMax", 0)))
    marks = ticks(low, high, bottom / 30, config)
    left = 10 + max(6.7 * len(text) + 4 * text.count("%") for _, text in marks)

    def at(t: float, v: float) -> tuple[float, float]:
        return left + (width - left - 2) * (t - start) / (end - start), 8 + (bottom - 8) * (high - v) / (high - low)

    def line(t: float, v: float, until: float, up: float, text: str, dx: float, dy: float, anchor: str) -> str:
        (x1, y1), (x2, y2) = at(t, v), at(until, up)
        return (
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#2b2f35"/>'
            f'<text x="{x1 + dx:.1f}" y="{y1 + dy:.1f}" text-anchor="{anchor}">{text}</text>'
        )

    parts = [line(start, v, end, v, text, -8, 4, "end") for v, text in marks]
    every = next(m * 60 for m in (10, 15, 30, 60, 120) if m * 60 * (width - left) / (end - start) >= 52)
    for t in range(math.ceil(start / every) * every, int(end) + 1, every):
        clock = f"{datetime.fromtimestamp(t, UTC):%H:%M}"
        parts.append(line(t, low, t, high, clock, 0, 17, "end" if t == end else "middle"))
    for (lower, upper), color in zip(curves, cycle(PALETTE)):
        breaks = [0, *(i for i in range(1, len(upper)) if upper[i][0] - upper[i - 1][0] > STEP), len(upper)]
        for i, j in pairwise(breaks):
            over, under = (
                " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in points)
                for points in (upper[i:j], lower[i:j][::-1])
            )
            parts.append(f'<polyline points="{over}" fill="none" stroke="{color}"/>')
            if opacity := custom.get("fillOpacity"):
                parts.append(f'<polygon points="{over} {under}" fill="{color}" opacity="{opacity / 100}"/>')
    return f'<svg width="{width:.0f}" height="{height - below:.0f}">{"".join(parts)}</svg>{names}'


def dashboard(board: dict, ask: Callable, start: float, end: float, namespaces: str) -> str:
    "The page; `ask(kind, **parameters)` is Prometheus' answer"
    cell, parts, tall = (WIDTH - 2 * MARGIN + GAP) / 24, [], 0
    for panel in board["panels"]:
        x, y, w, h = (panel["gridPos"][key] for key in "xywh")
        width, height, tall = w * cell - GAP, h * (ROW + GAP) - GAP, max(tall, (y + h) * (ROW + GAP))
        found = series(panel, ask, start, end, namespaces)
        if not found:
            inner = f"<div><p>{panel['fieldConfig']['defaults'].get('noValue', 'No data')}</p></div>"
        elif panel["type"] == "timeseries":
            inner = timeseries(panel, found, width - 18, height - 44, start, end)
        else:
            inner = {"stat": stat, "table": table}[panel["type"]](panel, found)
        place = f"left:{x * cell:.0f}px;top:{y * (ROW + GAP)}px;width:{width:.0f}px;height:{height}px"
        about = "<i>i</i>" if panel["description"] else ""
        parts.append(f'<section style="{place}"><h2>{escape(panel["title"])} {about}</h2>{inner}</section>')
    times = "{:%Y-%m-%d %H:%M} to {:%H:%M} UTC".format(*(datetime.fromtimestamp(t, UTC) for t in (start, end)))
    head = f"<header><b>{board['title']}</b><span>Namespace: All</span><span>{times}</span></header>"
    return f'<!doctype html><style>{STYLE}</style>{head}<main style="height:{tall + GAP}px">{"".join(parts)}</main>'
