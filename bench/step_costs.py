"""How well tables predict steps here, over several runs of `plait profile`; and the tables that plait ships.

Every run is a process of its own that measures a grid, fits half of an engine's steps and judges the others. What is
reported is every run, not the best. With --ship the run with the median error becomes the shipped table.

    python bench/step_costs.py --ship          a quiet machine, about 20 minutes (tiny alone: 8)
    python bench/step_costs.py --quick         does it work? about a minute
    python bench/step_costs.py --page          write the figures of the committed results into docs/costs.md

The checkpoint of 1.1 B parameters is random; it is written to $PEERS_ROOT/models/llama-1.1b if it is not there.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peers.checkpoints import ensure_llama
from results import RESULTS, Figure, write_result

from plait.costs import Profile, format_profile
from plait.profiler import read_profile

PAGE = Path(__file__).parents[1] / "docs/costs.md"
SHIPPED = Path(__file__).parents[1] / "src/plait/profiler/shipped"
BEGIN, END = "<!-- figures: written by `python bench/step_costs.py --page` -->", "<!-- end of figures -->"
QUICK = ("--rows", "16", "--context", "64", "--sequences", "4", "--repeats", "2", "--live-steps", "40")
GREEDY = ("--temperature", "0", "--live-steps", "2000")
"""Of a small model: drawing tokens in torch between two passes would slow the passes, and steps are short."""
SMALLER = ("--last-blocks", "1", "--live-steps", "80", "--repeats", "5")
"""Of a large model one block stands for all, and half as many steps take long enough."""
SHOWN = (
    ("operations", "operations held out"),
    ("steps", "steps of the engine, by tables"),
    ("steps, with the host", "the same with the host's part"),
    ("steps by roofline", "steps of the engine, by the tables' roofline"),
    ("steps by regression", "steps of the engine, by regression"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["tiny", "llama-1.1b"], choices=("tiny", "llama-1.1b"))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--runs", type=int, default=3, help="of tiny; a larger model has one")
    parser.add_argument(
        "--clock", default="wall", help="cpu: a busy machine's processor time, one thread only"
    )
    parser.add_argument("--processor", default="zen4", help="what shipped tables are called after")
    parser.add_argument(
        "--ship", action="store_true", help="write the median runs to src/plait/profiler/shipped"
    )
    parser.add_argument("--quick", action="store_true", help="a small grid, two runs, nothing shipped")
    parser.add_argument("--page", action="store_true", help="only write docs/costs.md from the results")
    arguments = parser.parse_args()
    if arguments.page:
        write_page()
        return
    chosen, began_s = dict[str, list[Profile]](), time.monotonic()
    for model in arguments.models:
        for threads in arguments.threads:
            name = f"{model}-{arguments.processor}" + (f"-{threads}t" if threads > 1 else "")
            runs = 2 if arguments.quick else arguments.runs if model == "tiny" else 1
            extra = QUICK if arguments.quick else GREEDY if model == "tiny" else SMALLER
            chosen[name] = [profile(model, threads, arguments.clock, extra) for _ in range(runs)]
    if arguments.ship and not arguments.quick:
        for name, runs in chosen.items():
            (SHIPPED / f"{name}.json").write_text(format_profile(median_run(runs)))
    write_result(
        "step_costs",
        settings={**vars(arguments), "minutes": round((time.monotonic() - began_s) / 60, 1)},
        samples={name: [samples_of(run) for run in runs] for name, runs in chosen.items()},
        summary={name: [summary_of(run) for run in runs] for name, runs in chosen.items()},
        figures=[figure(name, median_run(runs)) for name, runs in chosen.items()],
        columns=2,
    )


def profile(model: str, threads: int, clock: str, extra: tuple[str, ...]) -> Profile:
    """One run of `plait profile`, in its own process."""
    peers_root = Path(os.environ.get("PEERS_ROOT", Path.home() / "peers"))
    folder = model if model == "tiny" else str(ensure_llama(peers_root / "models" / model))
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "profile.json"
        command = [
            sys.executable,
            "-m",
            "plait",
            "profile",
            folder,
            "--threads",
            str(threads),
            "--clock",
            clock,
        ]
        subprocess.run([*command, "--out", str(file), *extra], check=True, stdout=subprocess.DEVNULL)
        return read_profile(file)


def median_run(runs: list[Profile]) -> Profile:
    """The run whose steps are predicted neither best nor worst."""
    return sorted(runs, key=lambda run: run.errors["steps"].mean)[(len(runs) - 1) // 2]


def summary_of(run: Profile) -> dict[str, Any]:
    """What one run says of its own accuracy."""
    return {
        "errors": {name: asdict(run.errors[name]) for name, _ in SHOWN if name in run.errors},
        "factors": asdict(run.factors),
        "host": asdict(run.host),
        "token_alone_s": run.tables.dense.at(1),
    }


def samples_of(run: Profile) -> list[tuple[str, int, int, float, float | None]]:
    """Every point that was measured, and its prediction if it was held out."""
    return [(each.operation, each.row, each.place, each.seconds, each.predicted_s) for each in run.samples]


def figure(name: str, run: Profile) -> Figure:
    """Predictions of held-out points over what was measured."""
    drawn = Figure(name, "measured, s", "predicted over measured", log_x=True)
    for operation in ("dense", "head", "prefill", "decode"):
        points = sorted(
            (each.seconds, each.predicted_s / each.seconds)
            for each in run.samples
            if each.operation == operation and each.predicted_s is not None
        )
        if points:
            drawn.add_line(operation, [at for at, _ in points], [ratio for _, ratio in points])
    return drawn


def write_page() -> None:
    """Replace what stands between the two marks."""
    result = json.loads((RESULTS / "step_costs.json").read_text(encoding="utf-8"))
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    body = "\n".join(tables(result))
    PAGE.write_text(f"{before}{BEGIN}\n\n{body}\n{END}{after}", encoding="utf-8")


def tables(result: dict[str, Any]) -> Iterator[str]:
    """A table for each model and number of threads: the median run, and the spread of all."""
    settings = result["settings"]
    yield (
        f"{result['hardware']['cpu']} ({result['hardware']['cores']} cores), bfloat16, `--clock {settings['clock']}`, "
        f"{result['date']}."
    )
    for name, runs in result["summary"].items():
        ordered = sorted(runs, key=lambda run: run["errors"]["steps"]["mean"])
        middle = ordered[(len(ordered) - 1) // 2]["errors"]
        yield ""
        yield f"| `{name}` | points | median | 95 % | mean | bias | mean of all {len(runs)} runs |"
        yield "|---|---|---|---|---|---|---|"
        for key, words in SHOWN:
            errors = middle[key]
            means = sorted(run["errors"][key]["mean"] for run in runs)
            yield (
                f"| {words} | {errors['count']} | {errors['median']:.1%} | {errors['p95']:.1%} | {errors['mean']:.1%} "
                f"| {errors['bias']:+.1%} | {means[0]:.1%} to {means[-1]:.1%} |"
            )
    yield ""


if __name__ == "__main__":
    main()
