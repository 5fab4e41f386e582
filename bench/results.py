"""What every measurement records, and how it is drawn: bench/results/NAME.json and NAME.png."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_SAMPLES = "@samples@"
VERSIONS_OF = ("torch", "numpy", "transformers", "fastapi", "uvicorn")


@dataclass
class Figure:
    """One set of axes with lines."""

    title: str
    x_label: str
    y_label: str
    log_x: bool = False
    log_y: bool = False
    lines: list[tuple[str, Sequence[float], Sequence[float]]] = field(default_factory=list)

    def add_line(self, name: str, x: Sequence[float], y: Sequence[float]) -> None:
        self.lines.append((name, x, y))


def write_result(
    name: str,
    *,
    settings: Mapping[str, Any],
    samples: Any,
    summary: Mapping[str, Any],
    figures: Sequence[Figure] = (),
    columns: int | None = None,
) -> Path:
    """Write one run: commit, settings, hardware, versions, raw samples and what they sum up to.

    The figures are drawn in one row, or in rows of `columns`.
    """
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    record = {
        "name": name,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": _commit(),
        "settings": settings,
        "hardware": _hardware(),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in VERSIONS_OF},
        },
        "summary": summary,
        "samples": _SAMPLES,
    }
    # Raw samples are for programs: on one line, or a diff of them hides everything else.
    readable = json.dumps(record, indent=1, default=str)
    file.write_text(readable.replace(json.dumps(_SAMPLES), json.dumps(samples, default=str)) + "\n")
    print(json.dumps(summary, indent=1, default=str))
    print(f"written: {file}", file=sys.stderr)
    if figures:
        _draw(file.with_suffix(".png"), figures, columns or len(figures))
    return file


def _draw(file: Path, figures: Sequence[Figure], columns: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-len(figures) // columns)
    canvas, grid = pyplot.subplots(rows, columns, figsize=(5.2 * columns, 4 * rows), squeeze=False)
    for axes in grid.flat[len(figures) :]:
        axes.set_axis_off()
    for axes, figure in zip(grid.flat, figures, strict=False):
        for name, x, y in figure.lines:
            axes.plot(x, y, marker="o", markersize=3, label=name)
        axes.set(title=figure.title, xlabel=figure.x_label, ylabel=figure.y_label)
        if figure.log_x:
            axes.set_xscale("log")
        if figure.log_y:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    canvas.tight_layout()
    canvas.savefig(file, dpi=110)


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", "src") else "")


def _hardware() -> dict[str, Any]:
    cpu = platform.processor()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {
        "machine": platform.machine(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average_before_1_min": os.getloadavg()[0],
    }
