"""Draw the dashboard's panels from a Prometheus server, without Grafana: for reports, and to check every query.

    python examples/grafana/draw.py --prometheus http://127.0.0.1:9090 --minutes 10 --out dashboard.png

Reads the queries, units and places of the panels from specplug.json beside this file. Exit status 1 where a query fails
or finds nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).with_name("specplug.json")
NUM_POINTS = 120
HEADING = 0.035

Curves = dict[str, list[tuple[float, float]]]


def ask(prometheus: str, path: str, **parameters: str) -> Any:
    """Prometheus's answer to one call of its HTTP API."""
    url = f"{prometheus.rstrip('/')}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)["data"]
    except urllib.error.HTTPError as error:
        raise SystemExit(f"error: {parameters.get('query', path)}: {error.read().decode()}") from error
    except OSError as error:
        raise SystemExit(f"error: no Prometheus answers at {prometheus}: {error}") from error


def curves(
    prometheus: str, panel: dict[str, Any], window: str, minutes: float, end: float
) -> dict[str, list[tuple[float, float]]]:
    """(seconds before the end, value) of every curve of a panel, by its name."""
    found: Curves = {}
    step = max(1.0, minutes * 60 / NUM_POINTS)
    for target in panel["targets"]:
        query = target["expr"].replace("$__rate_interval", window).replace("$model", ".*")
        data = ask(
            prometheus, "query_range", query=query, start=str(end - minutes * 60), end=str(end), step=f"{step:.0f}"
        )
        for result in data["result"]:
            name = target["legendFormat"]
            for label, value in result["metric"].items():
                name = name.replace("{{" + label + "}}", value)
            points = [(float(at) - end, float(value)) for at, value in result["values"]]
            found[name] = [(at, value) for at, value in points if math.isfinite(value)]
    return found


def shown(value: float, panel: dict[str, Any]) -> str:
    """A value in the panel's unit."""
    unit = panel["fieldConfig"]["defaults"]["unit"]
    if unit == "percentunit":
        return f"{value:.0%}"
    if unit == "s":
        return f"{1e3 * value:.3g} ms"
    if unit == "bytes":
        return f"{value / 1024:,.0f} KiB"
    return f"{value:,.{panel['fieldConfig']['defaults'].get('decimals', 0)}f}"


def draw_panel(axes: Any, panel: dict[str, Any], found: Curves) -> None:
    """One panel, as a curve or as a number."""
    defaults = panel["fieldConfig"]["defaults"]
    axes.set_title(panel["title"], loc="left", fontsize=10)
    if panel["type"] == "stat":
        axes.axis("off")
        for index, (name, points) in enumerate(found.items()):
            text = shown(points[-1][1], panel) if points else "-"
            axes.text((index + 0.5) / len(found), 0.55, text, ha="center", va="center", fontsize=22, color="#1f6fb4")
            axes.text((index + 0.5) / len(found), 0.1, name, ha="center", va="center", fontsize=9)
        return
    times = sorted({at for points in found.values() for at, _ in points})
    if defaults["custom"]["stacking"]["mode"] == "normal":
        rows = [[dict(points).get(at, 0.0) for at in times] for points in found.values()]
        axes.stackplot([at / 60 for at in times], rows, labels=list(found), alpha=0.75)
    else:
        for name, points in found.items():
            axes.plot([at / 60 for at, _ in points], [value for _, value in points], label=name)
    axes.set_ylim(bottom=defaults.get("min"), top=defaults.get("max"))
    axes.yaxis.set_major_formatter(lambda value, _: shown(value, panel))
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7, loc="best", ncols=2)


def main() -> None:
    """Ask and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="address of the Prometheus server")
    parser.add_argument("--minutes", type=float, default=10.0, help="how far back")
    parser.add_argument("--ago", type=float, default=0.0, help="minutes since the end of what is drawn")
    parser.add_argument("--window", default="30s", help="window of rates ($__rate_interval)")
    parser.add_argument("--dashboard", type=Path, default=DASHBOARD)
    parser.add_argument("--out", type=Path, default=Path("dashboard.png"))
    arguments = parser.parse_args()
    if arguments.minutes <= 0:
        parser.error("--minutes must be above 0")
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: matplotlib draws the panels: pip install 'vllm-specplug[plot]'")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    dashboard = json.loads(arguments.dashboard.read_text())
    panels = dashboard["panels"]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = pyplot.figure(figsize=(14, height * 0.4))
    figure.suptitle(dashboard["title"], fontsize=13)
    end, empty = time.time() - 60 * arguments.ago, []
    for panel in panels:
        place = panel["gridPos"]
        found = curves(arguments.prometheus, panel, arguments.window, arguments.minutes, end)
        empty += [panel["title"]] if not any(found.values()) else []
        left, bottom = place["x"] / 24, 1 - (place["y"] + place["h"]) / height
        box = (left + 0.045, bottom * (1 - HEADING) + 0.015, place["w"] / 24 - 0.06, place["h"] / height - 0.045)
        draw_panel(figure.add_axes(box), panel, found)
    figure.savefig(arguments.out, dpi=100)
    print(arguments.out)
    if empty:
        sys.exit(f"nothing found for: {', '.join(empty)}")


if __name__ == "__main__":
    main()
