"""How far the simulator is from the engine, on the machine that this runs on: levels L0 to L4, beside the noise floor.

    L0 decisions   live runs are recorded and replayed with the times that their steps took: all must be the same
    L1 operations  points of the profile that its tables were not shown
    L2 steps       steps of live runs that calibrated nothing, by tables and the host's part
    L3 requests    throughput, TTFT and TPOT at fractions of the measured capacity, live and simulated
    L4 choices     configurations ranked, live and simulated

What runs live is the serving path (engine thread, event loop, open-loop clients by schedule) with the CPU kernels in
bfloat16 on one thread; what is simulated is the event heap of `plait simulate` with tables that are measured first, and
with the host's part of a step fitted on traces of their own. Every live run is repeated: how much repeats differ is the
floor. How to read it: docs/fidelity.md.

    python bench/fidelity.py                     about 13 minutes of a quiet machine, more if it is disturbed
    python bench/fidelity.py --quick             about 2 minutes: does it work?
    python bench/fidelity.py --model medium      28 M random parameters: the kernels take nearly all of a step; L0 to L3
    python bench/fidelity.py --page              write the figures of the committed results into docs/fidelity.md
"""

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from fidelity.page import write_page
from fidelity.runs import Wish, all_levels
from fidelity.workloads import model_folder
from results import Figure as Axes
from results import write_result

from plait.profiler import read_profile

_PLACES: list[float] = np.linspace(0, 1, 101).tolist()


def wish_of(arguments: argparse.Namespace, folder: Path) -> Wish:
    """What is not said: a quarter of an hour for `tiny`; for larger models less, since everything takes them longer."""
    quick, small = arguments.quick, folder.name == "tiny"
    said: dict[str, int | None] = {
        "seeds": arguments.seeds,
        "repeats": arguments.repeats,
        "requests": arguments.requests,
        "configurations": arguments.configurations,
    }
    usual = {"seeds": 3, "repeats": 3, "requests": 300, "configurations": 10}
    if quick:
        usual = {
            "seeds": 1,
            "repeats": 2,
            "requests": 100 if small else 20,
            "configurations": 6 if small else 0,
        }
    elif not small:
        usual = {"seeds": 2, "repeats": 2, "requests": 60, "configurations": 0}
    return Wish(
        folder=folder,
        name=folder.name,
        loads=tuple(arguments.loads or ((0.6, 1.1) if quick else (0.3, 0.6, 0.9, 1.1))),
        profile_rows=512 if small else 256,
        profile_repeats=(5 if quick else 15) if small else (2 if quick else 5),
        live_steps=120 if small else 60,
        clock=arguments.clock,
        **{name: usual[name] if value is None else value for name, value in said.items()},
    )


def plots(samples: dict[str, Any], ranking: dict[str, Any]) -> list[Axes]:
    """Shares of requests over TTFT and TPOT, and the configurations."""
    drawn: list[Axes] = []
    for name, place in (("TTFT", 1), ("TPOT", None)):
        axes = Axes(
            f"{name}: live (each repeat) and simulated", f"{name} (s)", "share of requests", log_x=True
        )
        for load, both in samples.items():
            for number, repeat in enumerate(both["live"]):
                axes.add_line(f"live at {load}" if not number else "_", _quantiles(repeat, place), _PLACES)
            axes.add_line(f"simulated at {load}", _quantiles(both["simulated"], place), _PLACES)
        drawn.append(axes)
    if ranking:
        axes = Axes("P90 of E2E, by configuration", "live (s)", "simulated (s)", log_x=True, log_y=True)
        rows = ranking["P90 of E2E"]
        live: list[float] = [sum(row["live"]) / len(row["live"]) for row in rows]
        pairs = sorted(zip(live, (float(row["simulated"]) for row in rows), strict=True))
        axes.add_line("configurations", [known for known, _ in pairs], [ours for _, ours in pairs])
        axes.add_line("equal", sorted(live), sorted(live))
        drawn.append(axes)
    return drawn


def _quantiles(rows: list[list[float]], place: int | None) -> list[float]:
    if place is not None:
        values = [row[place] for row in rows]
    else:
        values = [(end - first) / (tokens - 1) for _, first, end, tokens in rows if tokens > 1]
    return np.quantile(values, _PLACES).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="tiny, medium, or the folder of a checkpoint")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--loads", type=float, nargs="+")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--repeats", type=int, help="live runs of each trace")
    parser.add_argument("--requests", type=int, help="of each run")
    parser.add_argument("--configurations", type=int, help="how many are ranked; 0 leaves L4 out")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="of the profile")
    parser.add_argument(
        "--profile", type=Path, help="one that was measured just before, in place of a new one"
    )
    parser.add_argument("--name", help="of the result; fidelity, or fidelity_MODEL")
    parser.add_argument("--page", action="store_true", help="only write docs/fidelity.md from the results")
    arguments = parser.parse_args()
    if arguments.page:
        write_page()
        return
    with tempfile.TemporaryDirectory() as scratch:
        wish = wish_of(arguments, model_folder(arguments.model, Path(scratch)))
        profile = read_profile(arguments.profile) if arguments.profile else None
        figures, details, samples = all_levels(wish, profile)
    name = arguments.name or ("fidelity" if wish.name == "tiny" else f"fidelity_{wish.name}")
    write_result(
        name,
        settings={**asdict(wish), "folder": wish.name, "profile": str(arguments.profile or "measured first")},
        samples=samples,
        summary={"figures": [{**asdict(figure), "holds": figure.holds} for figure in figures], **details},
        figures=plots(samples, details["L4"]),
    )
    for figure in figures:
        floor = "" if figure.floor is None else f"{figure.floor:9.4f}"
        mark = "" if figure.holds else "   MISSED"
        print(f"{figure.level}  {figure.what:44}{figure.value:10.4f}{figure.goal:8.2f}{floor}{mark}")


if __name__ == "__main__":
    main()
