"""The curves of a run: loss, learning rate, mIoU, and the IoU of each class."""
import io
import math
import warnings

import numpy as np
from PIL import Image

from fonts import PILLOW, font_runs, installed_fonts

MARKED_POINTS = 50  # a curve of more has no mark for each
RUNNING_PART = 10  # the running mean of the loss takes that part of all its values
CHART_SIZE = (13, 8.5)  # inches, of 100 pixels
CHART_STYLE = {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}
ROWS = 8  # a chart of fewer bars has room for so many, so that a bar is no block
BARS, BAR_NAME = 40, 30  # of more classes, a chart shows the best and the worst; of longer names, the first letters


def draw(metrics, names):
    """Loss, learning rate, mIoU, and IoU per class after two evaluations; metrics: metrics.jsonl's lines as dicts."""
    import matplotlib
    from matplotlib.figure import Figure

    tables = [line for line in metrics if line.get("IoU")]
    fonts = {installed_fonts()[path]: None for name in names for path, _ in font_runs(name) if path != PILLOW}
    with matplotlib.rc_context({"font.family": ["DejaVu Sans", *fonts], "text.parse_math": False, **CHART_STYLE}):
        figure = Figure(figsize=CHART_SIZE, dpi=100, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        panels = figure.subplot_mosaic("LC;MC;RC" if len(tables) > 1 else "L;M;R", height_ratios=(3, 3, 2))
        draw_losses(panels["L"], metrics)
        scores = draw_line(panels["M"], metrics, "mIoU", "validation mIoU, %", "tab:green")
        if len(scores):
            iteration, best = scores[scores[:, 1].argmax()]
            panels["M"].set_title(f"validation mIoU, %: best {best:.2f} at iteration {iteration:,.0f}", loc="left")
            panels["M"].axhline(best, color="grey", linewidth=0.8, linestyle="--")
            panels["M"].plot(iteration, best, "*", color="tab:green", markersize=13, markeredgecolor="white")
        draw_line(panels["R"], metrics, "lr", "learning rate", "tab:purple")
        panels["R"].set_xlabel("iteration")
        if len(tables) > 1:
            draw_bars(panels["C"], tables, names)
        with warnings.catch_warnings(record=True):  # of letters that no font has; `missing_font` says it better
            figure.savefig(file := io.BytesIO())
    return Image.open(file).convert("RGB")


def draw_line(axes, metrics, key, title, colour, **style):
    """Draws the finite numbers under `key` from 0 on; each has a mark if they are few. -> them: float [N, 2]"""
    found = [(line["iter"], line[key]) for line in metrics if line.get(key) is not None and math.isfinite(line[key])]
    points = np.array(found, float).reshape(-1, 2)
    axes.set_title(title, loc="left")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlim(0, 1.02 * max([1, *(line["iter"] for line in metrics)]))
    if found:
        axes.plot(*points.T, color=colour, marker="o" if len(found) <= MARKED_POINTS else "", markersize=4, **style)
        axes.set_ylim(0, 1.08 * points[:, 1].max() or 1)
    else:
        axes.text(0.5, 0.5, "none yet", transform=axes.transAxes, ha="center", va="center", color="grey")
        axes.set_yticks([])
    return points


def draw_losses(axes, metrics):
    """The losses, faint, and their running mean, on a logarithmic scale where they allow it."""
    window = max(1, sum(line.get("loss") is not None for line in metrics) // RUNNING_PART)
    title = "training loss" + (f", and its mean over {window} values" if window > 1 else "")
    iterations, losses = draw_line(axes, metrics, "loss", title, "tab:blue", alpha=0.3 if window > 1 else 1).T
    if window > 1:
        sums = np.cumsum([0, *losses])
        axes.plot(iterations[window - 1:], (sums[window:] - sums[:-window]) / window, color="tab:blue", linewidth=2)
    if losses.size and losses.max() > 5 * losses.min() > 0:  # which leaves two marks of 1, 2, 5, 10, ... at least
        axes.set_yscale("log", subs=(2, 5))
        axes.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
        axes.set_ylim(losses.min() / 1.1, losses.max() * 1.1)


def draw_bars(axes, tables, names):
    """Bars of each class's IoU in the last of some evaluation lines, with marks of that with the best mIoU."""
    last, best = tables[-1], max(tables, key=lambda line: line.get("mIoU") or 0)
    values, marks = last["IoU"], best["IoU"]
    shown = sorted(names, key=lambda name: -1 if values.get(name) is None else values[name])
    title = f"IoU per class at iteration {last['iter']:,}, %"
    if len(shown) > BARS:
        title += f" ({BARS // 2} best and worst)"
        shown = [*shown[:BARS // 2], None, *shown[-BARS // 2:]]
    axes.barh(range(len(shown)), [values.get(name) or 0 for name in shown], color="tab:green", alpha=0.6)
    if best is not last:
        axes.plot([marks.get(name) for name in shown], range(len(shown)), "k|", markersize=9)
        axes.set_xlabel(f"| at the best mIoU, iteration {best['iter']:,}")
    for row, name in enumerate(shown):
        text = "" if name is None else "absent" if values.get(name) is None else f"{values[name]:.1f}"
        axes.text(101, row, text, va="center", fontsize="small", color="dimgrey")
    labels = ["..." if name is None else name if len(name) <= BAR_NAME else f"{name[:BAR_NAME]}..." for name in shown]
    axes.set_yticks(range(len(shown)), labels, fontsize="small")
    axes.grid(False, axis="y")
    axes.set_title(title, loc="left")
    axes.set(xlim=(0, 100), ylim=(min(0, len(shown) - ROWS) - 0.6, len(shown) - 0.4))
