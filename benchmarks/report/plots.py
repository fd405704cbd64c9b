"""The plots of docs/performance.md, as SVG, from the kept results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.harness.stats import figure
from benchmarks.report.figures import Data, values

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "slm"  # the same figures give the same file
mpl.rcParams["svg.fonttype"] = "none"
mpl.rcParams["font.size"] = 9

from matplotlib import pyplot as plt  # noqa: E402 - after the backend is chosen
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: E402

LINES: dict[str, tuple[str, Any]] = {
    "slm": ("#0b6e4f", "-"),
    "etcd": ("#3366cc", "--"),
    "nats": ("#7f5fc7", "-."),
    "postgres": ("#336791", ":"),
    "redis": ("#c6302b", (0, (5, 1, 1, 1, 1, 1))),
}
SLM = LINES["slm"][0]


def draw(results: dict[str, Data], folder: Path) -> None:
    """Draw what there are results for."""
    folder.mkdir(parents=True, exist_ok=True)
    for bench, plot in PLOTS.items():
        if bench in results:
            plotted = plot(results[bench])
            plotted.savefig(folder / f"{bench}.svg", metadata={"Date": None}, bbox_inches="tight")
            plt.close(plotted)


def _logarithmic(axis: Any, *steps: float) -> None:
    """Label a logarithmic axis at these steps of each decade, as people write numbers."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _by_size(axes: Any, data: Data, field: str, colour: str, mark: str, label: str = "") -> None:
    """Draw the medians by size, and the spread of the repeats as a band."""
    sizes = [int(size) for size in data["per_size"]]
    figures = [figure(values(taken, field)) for taken in data["per_size"].values()]
    axes.plot(sizes, [f.median for f in figures], mark + "-", color=colour, label=label)
    low, high = [f.low for f in figures], [f.high for f in figures]
    axes.fill_between(sizes, low, high, color=colour, alpha=0.15)


def _fanout(data: Data) -> Any:
    plotted, axes = plt.subplots(figsize=(6.4, 3.6))
    _by_size(axes, data, "naive_ms", "#999999", "^", "await send_text in turn")
    _by_size(axes, data, "change_ms", SLM, "o", "SLM: commit to the last frame")
    _by_size(axes, data, "floor_ms", "#222222", "s", "C send() loop, same sockets")
    _logarithmic(axes.xaxis, 1)
    _logarithmic(axes.yaxis, 1, 3)
    axes.set(xlabel="subscribers", ylabel="ms until the last one has the change")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(frameon=False)
    return plotted


def _propagation(data: Data) -> Any:
    shapes = [shape["watchers"] for shape in data["shapes"]]
    plotted, all_axes = plt.subplots(1, len(shapes), figsize=(9, 3.4), sharey=True)
    for axes, shape in zip(all_axes, shapes, strict=True):
        for peer, per_shape in data["peers"].items():
            curves = [repeat["curve"] for repeat in per_shape[str(shape)]]
            # The median repeat at each quantile.
            times = [figure(column).median for column in zip(*curves, strict=True)]
            percents = [100 * k / (len(times) - 1) for k in range(len(times))]
            colour, dashes = LINES[peer]
            width, label = 2.2 if peer == "slm" else 1.4, data["labels"][peer]
            axes.plot(times, percents, c=colour, ls=dashes, lw=width, label=label)
        _logarithmic(axes.xaxis, 1, 2, 5)
        axes.set_xlabel("ms from the write's start to the callback")
        axes.set_title(f"{shape} watcher{'s' if shape != 1 else ''}")
        axes.grid(visible=True, which="both", alpha=0.25)
    all_axes[0].set_ylabel("% of callbacks")
    handles, labels = all_axes[0].get_legend_handles_labels()
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "ncols": len(labels)}
    plotted.legend(handles, labels, frameon=False, **below)
    return plotted


def _growth(data: Data) -> Any:
    plotted, all_axes = plt.subplots(1, 2, figsize=(8, 3))
    fields = (("put_p50_ms", "PUT, ms"), ("resolve_ns", "resolve, ns"))
    for axes, (field, label) in zip(all_axes, fields, strict=True):
        _by_size(axes, data, field, SLM, "o")
        _logarithmic(axes.xaxis, 1)
        axes.set_ylim(bottom=0)
        axes.set(xlabel="agents", ylabel=label)
        axes.grid(visible=True, alpha=0.3)
    plotted.tight_layout()
    return plotted


PLOTS: dict[str, Callable[[Data], Any]] = {
    "fanout": _fanout,
    "propagation": _propagation,
    "growth": _growth,
}
