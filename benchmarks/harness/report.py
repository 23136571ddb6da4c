"""What was measured, for people: Markdown tables and plots beside the JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from benchmarks.harness.rows import BASE, OURS, Result

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def write(folder: Path, name: str, result: Result, text: str, plot: Callable[[Result, Path], None]) -> None:
    """`folder/name` .json, .md and .png; the tables also on the screen."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{name}.md").write_text(text + "\n")
    plot(result, folder / f"{name}.png")
    click.echo(text)


# ---- tables ----------------------------------------------------------------------------------------------------------


def kernels(result: Result) -> str:
    """A table per layer: a line per row, a column per M."""
    parts = [_about(result)]
    for n, k in dict.fromkeys((case["n"], case["k"]) for case in result["cases"]):
        cases = [case for case in result["cases"] if (case["n"], case["k"]) == (n, k)]
        lines = []
        for name in dict.fromkeys(row["name"] for case in cases for row in case["rows"]):
            found = [next((row for row in case["rows"] if row["name"] == name), None) for case in cases]
            error = max(row["error"] for row in found if row is not None)
            lines.append([_bold(name), *("" if row is None else _microseconds(row) for row in found), f"{error:.1%}"])
        header = ["backend", *(f"M = {case['m']}" for case in cases), "error"]
        title = f"### N = {n}, K = {k}: microseconds (share of the limit; times as fast as the best peer of its width)"
        parts.append(_table(title, header, lines))
    return "\n\n".join(parts)


def models(result: Result) -> str:
    """A table per model."""
    parts = [_about(result)]
    if rows := result.get("encoder"):
        base = next((row for row in rows if row["name"] == BASE), None)
        batches = [key for key in rows[0] if key[0].isdigit()]
        lines = []
        for row in rows:
            cells = [f"{row[b]['median'] * 1e3:.2f}" for b in batches]
            if base:
                cells = [
                    f"{c} ({base[b]['median'] / row[b]['median']:.1f}x)" for c, b in zip(cells, batches, strict=True)
                ]
            cosine = f"{row['cosine_mean']:.5f} / {row['cosine_min']:.5f}" if "cosine_mean" in row else ""
            lines.append([_bold(row["name"]), *cells, cosine])
        title = "### all-MiniLM-L6-v2, sentences x tokens: milliseconds (times as fast as torch float32)"
        parts.append(_table(title, ["backend", *batches, "cosine to float32, mean / least"], lines))
    if rows := result.get("decoder"):
        bandwidth = result["limits"]["read_bandwidth"]["max"]
        lines = []
        for row in rows:
            ratio = row.get("ratio", {})
            cells = [
                f"{1 / row[f]['median']:.1f}" + (f" ({ratio[f]:.2f}x)" if f in ratio else "")
                for f in ("prompt", "decode")
            ]
            share = row["bytes"] / row["decode"]["median"] / bandwidth
            spread = f"{1 / row['decode']['max']:.1f} - {1 / row['decode']['min']:.1f}"
            lines.append([_bold(row["name"]), f"{row['bytes'] / 1e6:.0f}", *cells, spread, f"{share:.0%}"])
        title = "### 1.1 B Llama, random weights: tokens/s (times as fast as the best llama.cpp of its width)"
        header = ["backend", "MB read a token", "prompt of 512", "64 tokens after it", "spread", "of read bandwidth"]
        parts.append(_table(title, header, lines))
    return "\n\n".join(parts)


def _about(result: Result) -> str:
    """Machine, versions, limits, and who was left out."""
    machine, limits = result["machine"], result["limits"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, medians of {result['rounds']} turns, {machine['date']}.",
        f"{versions}.",
        f"Limits, best (median) of the run: {_best(limits['read_bandwidth'])} GB/s read from memory, "
        f"{_best(limits['dot_peak'])} int8 GOP/s in dot products.",
    ]
    reasons: dict[str, list[str]] = {}
    for name, why in result["notes"].items():
        reasons.setdefault(why, []).append(name)
    lines += [f"Left out ({why}): {', '.join(names)}." for why, names in reasons.items()]
    return "\n".join(lines)


def _best(limit: Result) -> str:
    return f"{limit['max'] / 1e9:.0f} ({limit['median'] / 1e9:.0f})"


def _table(title: str, header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(
        [f"{title}\n", *("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))]
    )


def _bold(name: str) -> str:
    return f"**{name}**" if name.startswith(OURS) else name


def _microseconds(row: Result) -> str:
    us = row["seconds"]["median"] * 1e6
    inside = [f"{row['of_limit']:.0%}"] if "of_limit" in row else []
    inside += [f"{row['ratio']['seconds']:.2f}x"] if "ratio" in row else []
    return f"{us:.{0 if us >= 20 else 1}f}" + (f" ({', '.join(inside)})" if inside else "")


# ---- plots -----------------------------------------------------------------------------------------------------------

_RED, _GREY, _INK = "#d1495b", "#8592a0", "#334155"


class Bar(NamedTuple):
    """limit: where the machine's own limit lies. part: not the whole of what the others do. A title has no value."""

    label: str
    value: float | None = None
    ours: bool = False
    limit: float | None = None
    part: bool = False


_TOKENS = {
    1: "One token at a time\n(a chatbot writing its answer)",
    32: "32 tokens at once\n(a sentence, or several users)",
    512: "512 tokens at once\n(reading a long prompt)",
}
_WIDTHS = {
    "32": "32 bits", "16": "16 bits", "8": "8 bits", "4": "4 bits", "3": "3 bits", "2": "2 bits",
    "ternary": "ternary (-1, 0, +1)",
}  # fmt: skip


def kernel_plot(result: Result, path: Path) -> None:
    """Times as fast as torch's float32 on the first layer; of each peer, its fastest way at a width."""
    n, k = result["cases"][0]["n"], result["cases"][0]["k"]
    cases = {case["m"]: case for case in result["cases"] if (case["n"], case["k"]) == (n, k)}
    panels = [(title, _layer_bars(cases[m])) for m, title in _TOKENS.items() if m in cases]
    machine = result["machine"]
    _draw(
        path,
        f"How many times as fast as 32-bit numbers? One {n} x {k} layer of a language model",
        f"Times the speed of PyTorch float32; longer is better.   Red: spicerack.   Grey: the best way of each other "
        f"runtime.   Black tick: what this machine's memory or arithmetic allows.\n{machine['cpu']}, "
        f"{machine['threads']} threads",
        panels,
    )


def _layer_bars(case: Result) -> list[Bar]:
    base = next((row["seconds"]["median"] for row in case["rows"] if row["name"] == BASE), None)
    bars = []
    for width, title in _WIDTHS.items() if base else ():
        best: dict[str, Result] = {}
        for row in case["rows"]:
            key = row["name"] if row["peer"] == OURS else row["peer"]
            if row["width"] == width and (key not in best or row["seconds"]["median"] < best[key]["seconds"]["median"]):
                best[key] = row
        bars += [Bar(title)] if best else []
        for row in sorted(best.values(), key=lambda row: float(row["seconds"]["median"])):
            speed = base / row["seconds"]["median"]
            bars.append(
                Bar(row["name"], speed, row["peer"] == OURS, speed / row["of_limit"] if "of_limit" in row else None)
            )
    return bars


def model_plot(result: Result, path: Path) -> None:
    """Sentences/s of the encoder at its largest batch, tokens/s of the decoder."""
    panels = []
    if rows := result.get("encoder"):
        batch = [key for key in rows[0] if key[0].isdigit()][-1]
        count, tokens = batch.split("x")
        bars = [Bar(row["name"], int(count) / row[batch]["median"], row["peer"] == OURS) for row in rows]
        panels.append((f"Sentences understood per second\n(all-MiniLM-L6-v2, {tokens} tokens each)", bars))
    for figure, title in (
        ("decode", "Tokens written per second"),
        ("prompt", "Tokens of a long prompt read per second"),
    ):
        if rows := result.get("decoder"):
            bars = [
                Bar(row["name"], 1 / row[figure]["median"], row["peer"] == OURS, part=row["name"].endswith("alone"))
                for row in rows
            ]
            panels.append((f"{title}\n(language model of 1.1 billion weights)", bars))
    machine = result["machine"]
    _draw(
        path,
        "How fast are whole models?",
        f"Longer is better.   Red: spicerack.   Pale red: its matrix products alone, without the rest of the model.   "
        f"Grey: other software.\n{machine['cpu']}, {machine['threads']} threads",
        panels,
    )


def _draw(path: Path, title: str, legend: str, panels: list[tuple[str, list[Bar]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(name, bars) for name, bars in panels if bars]
    if not panels:
        return
    size = (5.8 * len(panels), 2.2 + 0.28 * max(len(bars) for _, bars in panels))
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, (name, bars) in zip(axes[0], panels, strict=True):
        _panel(axis, name, bars)
    figure.suptitle(title, fontsize=14, fontweight="bold")
    figure.supxlabel(legend, fontsize=9.5, color=_INK)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Any, title: str, bars: list[Bar]) -> None:
    widest = max(max(bar.value or 0, bar.limit or 0) for bar in bars)
    for i, bar in enumerate(bars):
        if bar.value is None:
            continue
        axis.barh(-i, bar.value, color=_RED if bar.ours else _GREY, alpha=0.45 if bar.part else 1.0, height=0.75)
        text, inside = f" {bar.value:.{0 if bar.value >= 100 else 1}f} ", bar.value > widest / 6
        color = "white" if inside and not bar.part else _INK
        axis.text(bar.value, -i, text, va="center", ha="right" if inside else "left", fontsize=8.5, color=color)
        if bar.limit is not None:
            axis.plot([bar.limit, bar.limit], [-i - 0.42, -i + 0.42], color="black", linewidth=1.8)
    axis.set_yticks([-i for i in range(len(bars))], [bar.label for bar in bars], fontsize=8.5)
    for tick, bar in zip(axis.get_yticklabels(), bars, strict=True):
        tick.set_fontweight("bold" if bar.value is None else "normal")
        tick.set_color(_RED if bar.ours else _INK)
    axis.set_title(title, fontsize=11)
    axis.set_ylim(0.4 - len(bars), 0.7)
    axis.set_xlim(0, widest * 1.05)
    axis.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
