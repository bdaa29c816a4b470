# SPDX-License-Identifier: Apache-2.0
"""Pictures of decode steps: a sweep over contexts (RetrievalAttention, figure 1), and the kernels of one layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_sweep(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Milliseconds of a step, and bytes on the GPU, over the context; a line for each way, batch and limit of rows.

    Rows that there was no memory for have no step, and are left out.
    """
    rows = [row for row in rows if row["step_ms_p50"] is not None]
    pyplot = _pyplot()
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        asked = f", {row['rows']:,} rows" if row["way"] in ("sketch", "faiss") else ""
        lines.setdefault(f"{row['way']}, batch {row['batch']}{asked}", []).append(row)
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5))
    names = {"step_ms_p50": "decode step, ms (median)", "gpu_bytes": "GPU memory of the requests, GB"}
    for axis, (key, label) in zip(axes, names.items(), strict=True):
        for name, members in lines.items():
            ordered = sorted(members, key=lambda row: row["context"])
            scale = 1e9 if key == "gpu_bytes" else 1
            axis.plot(
                [row["context"] for row in ordered], [row[key] / scale for row in ordered], marker="o", label=name
            )
        axis.set_xscale("log", base=2)
        contexts = sorted({row["context"] for row in rows})
        axis.set_xticks(contexts, [f"{n // 1024}K" if n >= 1024 else str(n) for n in contexts])
        axis.set_ylim(bottom=0)
        axis.set_xlabel("context, tokens")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"{rows[0]['shape']}, {rows[0]['device']}")
    _save(pyplot, figure, path)


def plot_timeline(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One lane for each row of bench/timeline.py: when the kernels of a layer run."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(11, 1.4 + 0.8 * len(rows)))
    names = list(dict.fromkeys(span["name"] for row in rows for span in row["spans"]))
    for number, row in enumerate(rows):
        for span in row["spans"]:
            begin, width = span["begin_us"], span["end_us"] - span["begin_us"]
            axis.barh(number, width, left=begin, color=f"C{names.index(span['name'])}", edgecolor="white")
            axis.text(begin + width / 2, number, f"{width:.0f}", ha="center", va="center", fontsize=8)
        axis.text(row["layer_us"], number, f"  {row['layer_us']:.0f} us", va="center", fontsize=9)
    labels = [f"{row['tokens'] // 1024}K, batch {row['rows_batch']}, {row['rows']} rows" for row in rows]
    axis.set_yticks(range(len(rows)), labels)
    axis.invert_yaxis()
    axis.set_xlim(right=max(row["layer_us"] for row in rows) * 1.12)
    axis.set_xlabel("microseconds from the first kernel of the layer, inside a CUDA graph")
    axis.legend(
        [pyplot.Rectangle((0, 0), 1, 1, color=f"C{i}") for i in range(len(names))], names, ncols=len(names),
        loc="lower left", bbox_to_anchor=(0, 1), frameon=False,
    )  # fmt: skip
    axis.set_title(rows[0]["device"], loc="right", fontsize=9)
    _save(pyplot, figure, path)


def _save(pyplot: Any, figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
