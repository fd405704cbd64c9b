"""The plots of docs/performance.md, as SVG, from the kept results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.harness.stats import figure

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "slm"  # the same figures give the same file
mpl.rcParams["svg.fonttype"] = "none"
mpl.rcParams["font.size"] = 9

from matplotlib import pyplot as plt  # noqa: E402 - after the backend is chosen
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: E402

COLOURS = {
    "slm": "#0b6e4f",
    "etcd": "#3366cc",
    "nats": "#7f5fc7",
    "postgres": "#336791",
    "redis": "#c6302b",
}
DASHES = {"slm": "-", "etcd": "--", "nats": "-.", "postgres": ":", "redis": (0, (5, 1, 1, 1, 1, 1))}


def draw(results: dict[str, dict[str, Any]], folder: Path) -> list[str]:
    """Draw what there are results for; return the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for bench, name, plot in (
        ("fanout", "fanout.svg", _fanout),
        ("propagation", "propagation.svg", _propagation),
        ("growth", "growth.svg", _growth),
    ):
        if bench in results:
            plotted = plot(results[bench])
            plotted.savefig(folder / name, metadata={"Date": None}, bbox_inches="tight")
            plt.close(plotted)
            drawn.append(name)
    return drawn


def _plain_log(axis: Any, *steps: float) -> None:
    """Label a logarithmic axis at these steps of each decade, as people write numbers."""
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def _fanout(data: dict[str, Any]) -> Any:
    sizes = [int(size) for size in data["per_size"]]
    plotted, axes = plt.subplots(figsize=(6.4, 3.6))
    for name, label, colour, mark in (
        ("naive_ms", "await send_text in turn", "#999999", "^"),
        ("change_ms", "SLM: commit to the last frame", COLOURS["slm"], "o"),
        ("floor_ms", "C send() loop, same sockets", "#222222", "s"),
    ):
        figures = [figure([r[name] for r in data["per_size"][str(size)]]) for size in sizes]
        axes.plot(sizes, [f.median for f in figures], mark + "-", color=colour, label=label)
        axes.fill_between(
            sizes, [f.low for f in figures], [f.high for f in figures], color=colour, alpha=0.15
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_log(axes.xaxis, 1)
    _plain_log(axes.yaxis, 1, 3)
    axes.set_xlabel("subscribers")
    axes.set_ylabel("ms until the last one has the change")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(frameon=False)
    return plotted


def _propagation(data: dict[str, Any]) -> Any:
    shapes = [str(shape["watchers"]) for shape in data["shapes"]]
    plotted, all_axes = plt.subplots(1, len(shapes), figsize=(9, 3.4), sharey=True)
    for axes, shape in zip(all_axes, shapes, strict=True):
        for peer, per_shape in data["peers"].items():
            curves = [repeat["curve"] for repeat in per_shape.get(shape, [])]
            if not curves:
                continue
            # The median repeat at each quantile.
            values = [figure(column).median for column in zip(*curves, strict=True)]
            percents = [100 * k / (len(values) - 1) for k in range(len(values))]
            axes.plot(
                values,
                percents,
                color=COLOURS.get(peer),
                linestyle=DASHES.get(peer, "-"),
                linewidth=2.2 if peer == "slm" else 1.4,
                label=data["labels"][peer],
            )
        axes.set_xscale("log")
        _plain_log(axes.xaxis, 1, 2, 5)
        axes.set_xlabel("ms from the write's start to the callback")
        axes.set_title(f"{shape} watcher{'s' if shape != '1' else ''}")
        axes.grid(visible=True, which="both", alpha=0.25)
    all_axes[0].set_ylabel("% of callbacks")
    handles, labels = all_axes[0].get_legend_handles_labels()
    plotted.legend(
        handles,
        labels,
        frameon=False,
        ncols=len(labels),
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
    )
    return plotted


def _growth(data: dict[str, Any]) -> Any:
    sizes = [int(size) for size in data["per_size"]]
    plotted, all_axes = plt.subplots(1, 2, figsize=(8, 3))
    for axes, (name, label) in zip(
        all_axes, (("put_p50_ms", "PUT, ms"), ("resolve_ns", "resolve, ns")), strict=True
    ):
        figures = [figure(data["per_size"][str(size)][name]) for size in sizes]
        axes.plot(sizes, [f.median for f in figures], "o-", color=COLOURS["slm"])
        axes.fill_between(
            sizes,
            [f.low for f in figures],
            [f.high for f in figures],
            color=COLOURS["slm"],
            alpha=0.15,
        )
        axes.set_xscale("log")
        _plain_log(axes.xaxis, 1)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("agents")
        axes.set_ylabel(label)
        axes.grid(visible=True, alpha=0.3)
    plotted.tight_layout()
    return plotted
