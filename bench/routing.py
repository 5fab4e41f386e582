"""Choosing chains: how close the evolutionary search comes to the exact front, and how long each mode takes.

Random swarms as in the brief (spans of blocks/16 to blocks/3, log-normal rates, round trips of points in a plane),
both pairs of objectives. Hypervolume is a share of the exact front's. Beside NSGA-II with its seeds (the mode as it
is) run NSGA-II from random walks alone, and random walks alone, each with the same number of evaluations. Time to
chain is from a view to a chain; `kept` is what a `Router` needs once it has the view's graph (and front). CPU time
of the thread is what counts on a busy machine; wall time is recorded beside it.

Last, what does not decompose over hops: sessions that start at once, on machines that are paid while they are in
use. Choosing for one after the other is compared with the front of all together.

    nice python bench/routing.py             a few minutes on one core
    nice python bench/routing.py --quick     to see that it works; writes nothing
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from results import Figure, write_result

from plait.cluster import SwarmView, random_swarm
from plait.routing import (
    LATENCY_AND_THROUGHPUT,
    NETWORK_AND_COMPUTE,
    ObjectiveName,
    Router,
    RouteWish,
    assign_chains,
    choose_chain,
    nondominated,
    normalised_hypervolume,
)
from plait.routing.costs import seconds_per_block
from plait.routing.evolution import Genome, SearchBudget, evolve_front
from plait.routing.front_search import exact_front
from plait.routing.graph import chain_graph
from plait.routing.objectives import objectives_on
from plait.routing.operators import PathOperators
from plait.routing.path_values import PathValues
from plait.routing.seeds import seed_paths

PAIRS = {"A: network, compute": NETWORK_AND_COMPUTE, "B: latency, throughput": LATENCY_AND_THROUGHPUT}
SIZES = ((60, 80, None), (300, 126, 64), (1000, 126, 64))  # workers, blocks, round trips in a record
JOINT_SESSIONS = (4, 16)
MODES: dict[str, RouteWish] = {
    "load (the default)": RouteWish(mode="load"),
    "latency": RouteWish(mode="latency"),
    "throughput": RouteWish(mode="throughput"),
    "exact, pair A": RouteWish(mode="exact", objectives=NETWORK_AND_COMPUTE),
    "exact, pair A, slack 1 %": RouteWish(mode="exact", objectives=NETWORK_AND_COMPUTE, slack_fraction=0.01),
    "exact, pair B": RouteWish(mode="exact", objectives=LATENCY_AND_THROUGHPUT),
    "tradeoff, pair A": RouteWish(mode="tradeoff", objectives=NETWORK_AND_COMPUTE),
    "tradeoff, pair B": RouteWish(mode="tradeoff", objectives=LATENCY_AND_THROUGHPUT),
}


def swarm(peers: int, blocks: int, pinged: int | None, seed: int) -> SwarmView:
    return random_swarm(np.random.default_rng(seed), peers=peers, blocks=blocks, pinged_peers=pinged)


def fronts(
    view: SwarmView, names: tuple[ObjectiveName, ...], *, seeds: int, evaluations: int
) -> dict[str, Any]:
    """Exact, searched and random fronts of one swarm; values are minimised."""
    graph = chain_graph(view, range(view.model_blocks))
    costs = objectives_on(graph, names, 0).costs
    began_s = time.thread_time()
    exact = exact_front(graph, costs)
    found: dict[str, Any] = {"exact": exact.values.tolist(), "exact_cpu_s": time.thread_time() - began_s}
    table, operators = PathValues(graph), PathOperators(graph, seconds_per_block(graph))

    def evaluate(genomes: Sequence[Genome]) -> np.ndarray:
        return table.values(costs, [paths[0] for paths in genomes])

    def evolved(rng: np.random.Generator, seeded: bool) -> np.ndarray:
        return evolve_front(
            operators,
            evaluate,
            objectives=2,
            seeds=[(path,) for path in seed_paths(graph, costs)] if seeded else (),
            max_hops=view.model_blocks,
            budget=SearchBudget(evaluations=evaluations),
            rng=rng,
        ).values

    def walked(rng: np.random.Generator) -> np.ndarray:
        values = table.values(costs, [operators.draw(rng) for _ in range(evaluations)])
        return values[nondominated(values)]

    searches: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
        "nsga2": lambda rng: evolved(rng, True),
        "nsga2_random_start": lambda rng: evolved(rng, False),
        "random_walks": walked,
    }
    for search, run in searches.items():
        shares, cpu_s = [], []
        for seed in range(seeds):
            began_s = time.thread_time()
            values = run(np.random.default_rng(seed))
            cpu_s.append(time.thread_time() - began_s)
            shares.append(normalised_hypervolume(values, exact.values))
            if seed == 0:
                found[f"{search}_front"] = values.tolist()
        found[search] = {"hypervolume": shares, "cpu_s": cpu_s}
    return found


def times(view: SwarmView, wish: RouteWish, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds from a view to a chain, and with a router that has seen the view."""
    blocks = range(view.model_blocks)
    rng = np.random.default_rng(0)
    router = Router()
    router.choose(view, blocks, wish, rng=rng)
    runs: dict[str, Callable[[], object]] = {
        "new": lambda: choose_chain(view, blocks, wish, rng=rng),
        "kept": lambda: router.choose(view, blocks, wish, rng=rng),
    }
    taken: dict[str, dict[str, list[float]]] = {}
    for name, run in runs.items():
        cpu_ms, wall_ms = [], []
        for _ in range(repeats):
            wall_s, cpu_s = time.perf_counter(), time.thread_time()
            run()
            cpu_ms.append(1e3 * (time.thread_time() - cpu_s))
            wall_ms.append(1e3 * (time.perf_counter() - wall_s))
        taken[name] = {"cpu_ms": cpu_ms, "wall_ms": wall_ms}
    return taken


def joint(view: SwarmView, sessions: int, *, evaluations: int, seed: int) -> dict[str, Any]:
    """Sessions that start at once: choosing one by one against the front of all together."""
    began_s = time.thread_time()
    front = assign_chains(
        view,
        range(view.model_blocks),
        sessions=sessions,
        objectives=("mean_round_s", "price"),
        need_tokens=500,
        evaluations=evaluations,
        rng=np.random.default_rng(seed),
    )
    cpu_s = time.thread_time() - began_s
    values = [member.values for member in front.members]
    in_turn_s, in_turn_price = front.one_by_one.values
    # How much cheaper one can be if rounds may take a twentieth longer.
    near = min(price for round_s, price in values if round_s <= 1.05 * in_turn_s)
    return {
        "sessions": sessions,
        "one_by_one": [in_turn_s, in_turn_price],
        "front": [list(point) for point in values],
        "best_round_ratio": min(round_s for round_s, _ in values) / in_turn_s,
        "price_ratio_within_5_percent": near / in_turn_price,
        "cheapest_price_ratio": min(price for _, price in values) / in_turn_price,
        "cpu_s": cpu_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--swarms", type=int, default=5, help="random swarms of each size")
    parser.add_argument("--seeds", type=int, default=5, help="searches in each swarm")
    parser.add_argument("--evaluations", type=int, default=RouteWish().evaluations)
    parser.add_argument("--repeats", type=int, default=20, help="timed choices; a tenth of them for searches")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.swarms, options.seeds, options.evaluations, options.repeats = 1, 1, 500, 2
    samples: dict[str, Any] = {}
    for peers, blocks, pinged in SIZES:
        size = samples.setdefault(f"{peers} x {blocks}", {"fronts": {}, "times": {}})
        for number in range(options.swarms):
            view = swarm(peers, blocks, pinged, number)
            for pair, names in PAIRS.items():
                size["fronts"].setdefault(pair, []).append(
                    fronts(view, names, seeds=options.seeds, evaluations=options.evaluations)
                )
            for sessions in JOINT_SESSIONS if peers == SIZES[0][0] else ():
                size.setdefault("joint", []).append(
                    joint(view, sessions, evaluations=4 * options.evaluations, seed=number)
                )
            for mode, wish in MODES.items():
                repeats = max(1, options.repeats // (10 if wish.mode == "tradeoff" else 1))
                size["times"].setdefault(mode, []).append(times(view, wish, repeats))
    summary = {
        size: {
            "hypervolume": {pair: summarise_fronts(runs) for pair, runs in found["fronts"].items()},
            "time_to_chain_ms": {mode: summarise_times(runs) for mode, runs in found["times"].items()},
        }
        | ({"joint": summarise_joint(found["joint"])} if "joint" in found else {})
        for size, found in samples.items()
    }
    if options.quick:
        print(json.dumps(summary, indent=1))
        return
    write_result(
        "routing",
        settings=vars(options) | {"pymoo": version("pymoo")},
        samples=samples,
        summary=summary,
        figures=figures(samples),
    )


def summarise_fronts(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Over swarms and seeds."""
    summary: dict[str, Any] = {
        "exact_points": [len(run["exact"]) for run in runs],
        "exact_cpu_ms": round(1e3 * statistics.median(run["exact_cpu_s"] for run in runs), 1),
    }
    for search in ("nsga2", "nsga2_random_start", "random_walks"):
        shares = [run[search]["hypervolume"] for run in runs]
        summary[search] = {
            "hypervolume_median": round(median(shares), 4),
            "hypervolume_worst": round(min(map(min, shares)), 4),
            "widest_spread_of_seeds": round(max(max(share) - min(share) for share in shares), 4),
            "cpu_s": round(median(run[search]["cpu_s"] for run in runs), 3),
        }
    return summary


def summarise_joint(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over swarms, by the number of sessions."""
    return {
        str(sessions): {
            name: round(statistics.median(run[name] for run in runs if run["sessions"] == sessions), 4)
            for name in ("best_round_ratio", "price_ratio_within_5_percent", "cheapest_price_ratio", "cpu_s")
        }
        for sessions in JOINT_SESSIONS
    }


def median(samples: Iterable[Sequence[float]]) -> float:
    """Of all samples together."""
    return statistics.median(itertools.chain.from_iterable(samples))


def summarise_times(runs: Sequence[dict[str, dict[str, list[float]]]]) -> dict[str, float]:
    return {
        f"{name}_{clock}": round(median(run[name][clock] for run in runs), 3)
        for name in ("new", "kept")
        for clock in ("cpu_ms", "wall_ms")
    }


def figures(samples: dict[str, Any]) -> list[Figure]:
    drawn: list[Figure] = []
    for size in ("60 x 80", "300 x 126"):
        for pair, (x_label, y_label) in {
            "A: network, compute": ("network, s a token", "computing, s a token"),
            "B: latency, throughput": ("latency, s a token", "minus tokens/s"),
        }.items():
            # The swarm with the longest front shows most.
            run = max(samples[size]["fronts"][pair], key=lambda one: len(one["exact"]))
            figure = Figure(f"{size}, {pair}", x_label, y_label)
            for name, key in (
                ("exact", "exact"),
                ("NSGA-II", "nsga2_front"),
                ("NSGA-II, random start", "nsga2_random_start_front"),
                ("random walks", "random_walks_front"),
            ):
                points = sorted(run[key])
                figure.add_line(name, [point[0] for point in points], [point[1] for point in points])
            drawn.append(figure)
    return drawn


if __name__ == "__main__":
    main()
