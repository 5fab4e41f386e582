"""The routing modes on a swarm of real processes: time per token, tokens per second, fairness, prediction.

Eight workers of a 16-block Llama with random weights stand in three places, 5 ms across, 50 or 100 ms from each other,
and are 1 to 8 times slower than one another; a gateway stands in each place. Workers and gateways are `plait join` and
`plait serve --swarm`, over TCP and TLS, whose bytes leave later and whose forward passes wait (swarm/slowed.py): rates
and round trips are what the machines measure and announce. Clients ask over HTTP, one answer after the other.

Under every mode, for 1 to 64 clients: time per token, tokens per second of all, fairness (Jain's index of the clients'
tokens), which machines had the work, time to chain and to the first token. A lone client's answers are compared with
what the route predicted: by the mode itself (PETALS' cost model, for all but `load`), and by plait's model of a round.
`pinned` is a control: the chain that is best for a lone client beside its first gateway, for everybody.

On a busy machine delays of the processors show as slowness; `passes_late` in the result says how much. Linux shares
time among sessions: `setsid sh -c 'echo -13 > /proc/self/autogroup; python bench/routing_live.py'` (root) goes first.

    python bench/routing_live.py           about 25 minutes; the processors are hardly used
    python bench/routing_live.py --quick   to see that it works; writes nothing
    python bench/routing_live.py --plan    seconds: what clients would get if one planner placed all of them at once
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from results import Figure, write_result
from swarm.crowd import ANSWER_TOKENS, PROMPT_TOKENS, Asked, Crowd
from swarm.route_log import FoundChain, RouteLog
from swarm.three_places import LAYOUT, RTTS_S, injected_view
from swarm.unequal import BLOCKS, PASS_S, ROW_S, UnequalSwarm

from plait.cluster import swarm_of_description
from plait.errors import ServingError
from plait.routing import RouteWish, assign_chains, choose_chain, expected_round_s

EVALUATIONS = 1000
PAIR_A, PAIR_B = ["network_s", "compute_s"], ["step_s", "rate_tokens_per_s"]
LOAD, LATENCY, THROUGHPUT, PINNED = "load (plait)", "latency (PETALS)", "throughput (PETALS)", "pinned"


def tradeoff(objectives: list[str], pick: str) -> dict[str, Any]:
    return {"mode": "tradeoff", "objectives": objectives, "pick": pick, "evaluations": EVALUATIONS}


MODES: dict[str, dict[str, Any]] = {
    LATENCY: {"mode": "latency"},
    THROUGHPUT: {"mode": "throughput"},
    "tradeoff A, balanced": tradeoff(PAIR_A, "balanced"),
    "tradeoff A, sampled": tradeoff(PAIR_A, "sampled"),
    "tradeoff B, balanced": tradeoff(PAIR_B, "balanced"),
    "tradeoff B, sampled": tradeoff(PAIR_B, "sampled"),
    "exact B, balanced": {"mode": "exact", "objectives": PAIR_B, "pick": "balanced"},
    LOAD: {"mode": "load"},
    PINNED: {},
}
MAX_PINNED = 4


def run_cell(
    swarm: UnequalSwarm,
    mode: str,
    route: Mapping[str, Any],
    clients: int,
    warm_up_s: float,
    measured_s: float,
) -> dict[str, Any]:
    """One mode with so many clients, from a swarm without sessions to such a one."""
    swarm.wait_quiet()
    status = {gateway: swarm.status(gateway) for gateway in swarm.origins}
    tokens_before = swarm.tokens_by_machine()
    crowd = Crowd(swarm, route, clients, seed=clients)
    until_s = asyncio.run(crowd.ask_for_s(warm_up_s + measured_s))
    found = RouteLog(swarm).read()
    since_s = until_s - measured_s
    steps = [
        later - one
        for answer in crowd.answers
        for one, later in itertools.pairwise(answer.token_s)
        if later > since_s
    ]
    each = [0] * clients
    for answer in crowd.answers:
        each[answer.client] += sum(at_s > since_s for at_s in answer.token_s)
    measured = [answer for answer in crowd.answers if answer.asked_s > since_s and answer.token_s]
    chains = [found[answer.request] for answer in crowd.answers if answer.request in found]
    first_s = [answer.token_s[0] - answer.asked_s for answer in measured]
    to_chain_s = [found[answer.request].found_in_s for answer in measured if answer.request in found]
    shares = swarm.tokens_by_machine() - tokens_before
    cell = {
        "mode": mode,
        "clients": clients,
        "tokens": sum(each),
        "p50_token_s": percentile(steps, 50),
        "p95_token_s": percentile(steps, 95),
        "tokens_per_s": sum(each) / measured_s,
        "fairness": sum(each) ** 2 / (clients * sum(tokens**2 for tokens in each)) if any(each) else 0.0,
        "p5_client_tokens_per_s": float(np.percentile(each, 5)) / measured_s,
        "p50_first_token_s": percentile(first_s, 50),
        "p95_first_token_s": percentile(first_s, 95),
        "p50_to_chain_s": percentile(to_chain_s, 50),
        "p95_to_chain_s": percentile(to_chain_s, 95),
        "chains": len({chain.text for chain in chains}),
        "machine_shares": {
            worker.name: round(shares[worker.name] / max(1, sum(shares.values())), 3)
            for worker in LAYOUT.workers
        },
        "errors": sum(bool(answer.error) for answer in crowd.answers),
        "load_average": os.getloadavg()[0],
    }
    if clients == 1:
        cell["predictions"] = predictions(crowd.answers, found, status)
        cell["chain_tokens"] = dict(Counter(chain.text for chain in chains).most_common(4))
    return {name: round(value, 5) if isinstance(value, float) else value for name, value in cell.items()}


def predictions(
    answers: Iterable[Asked], found: Mapping[str, FoundChain], status: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Of each whole answer of a lone client: median time per token, and what was predicted when it began."""
    views = {gateway: swarm_of_description(seen) for gateway, seen in status.items()}
    rows: list[dict[str, Any]] = []
    for answer in answers:
        if not answer.complete or answer.request not in found:
            continue
        steps = [later - one for one, later in itertools.pairwise(answer.token_s)]
        chain = found[answer.request]
        rows.append(
            {
                "gateway": answer.gateway,
                "chain": chain.text,
                "measured_s": round(statistics.median(steps), 5),
                "by_mode_s": round(chain.expected_s, 5),
                "by_round_s": round(expected_round_s(views[answer.gateway], chain.chain), 5),
            }
        )
    return rows


def best_pinned(swarm: UnequalSwarm) -> list[str]:
    """The machines of the chain with the least expected round, of all that can be named."""
    view = swarm_of_description(swarm.status(next(iter(swarm.origins))))
    names = {peer: record.name for peer, record in view.records.items() if record.span}
    best: tuple[float, list[str]] = (float("inf"), [])
    for count in range(1, MAX_PINNED + 1):
        for peers in itertools.permutations(names, count):
            try:
                wish = RouteWish(mode="pinned", pinned=peers)
                routed = choose_chain(view, range(BLOCKS), wish, rng=np.random.default_rng(0))
            except ServingError:
                continue
            found = (expected_round_s(view, routed.chain), [names[peer] for peer in peers])
            best = min(best, found)
    return best[1]


def plan(clients: int) -> dict[str, float]:
    """The least mean round that a joint assignment of all clients has by plait's model, knowing what is injected."""
    front = assign_chains(
        injected_view("gate-a"),
        range(BLOCKS),
        sessions=clients,
        objectives=("mean_round_s", "price"),
        need_tokens=PROMPT_TOKENS + ANSWER_TOKENS[1],
        evaluations=8000,
        rng=np.random.default_rng(0),
    )
    round_s = min(member.values[0] for member in front.members)
    return {"round_s": round(round_s, 4), "tokens_per_s": round(clients / round_s, 1)}


def announced(swarm: UnequalSwarm) -> dict[str, Any]:
    """What machines announce beside what was injected."""
    status = swarm.status(next(iter(swarm.origins)))
    names = {machine["peer"]: machine["name"] for machine in status["machines"]}
    rates = {machine["name"]: machine["decode_tokens_per_s"] for machine in status["machines"]}
    saturated = {machine["name"]: machine["saturated_decode_tokens_per_s"] for machine in status["machines"]}
    rtt_errors = [
        link["rtt_s"] / LAYOUT.rtt_s(names[link["from"]], names[link["to"]]) - 1
        for link in status["links"]
        if link["from"] in names and link["to"] in names and link["rtt_s"]
    ]
    return {
        "decode_rate_over_injected": {
            worker.name: round(rates[worker.name] * worker.slowdown * (PASS_S + ROW_S), 3)
            for worker in LAYOUT.workers
        },
        "saturated_rate_over_injected": {
            worker.name: round(saturated[worker.name] * worker.slowdown * ROW_S, 3)
            for worker in LAYOUT.workers
        },
        "rtt_error_median": round(statistics.median(rtt_errors), 3),
        "rtt_error_p95": round(float(np.percentile(rtt_errors, 95)), 3),
    }


def summarise(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds, by clients and mode; and how far off the predictions were."""
    summary: dict[str, Any] = {}
    for clients, mode in dict.fromkeys((cell["clients"], cell["mode"]) for cell in cells):
        rows = [cell for cell in cells if (cell["clients"], cell["mode"]) == (clients, mode)]
        summary.setdefault(f"{clients} clients", {})[mode] = {
            name: median_of(rows, name)
            for name in (
                *("p50_token_s", "p95_token_s", "tokens_per_s", "fairness", "p5_client_tokens_per_s"),
                *("p50_first_token_s", "p95_first_token_s", "p50_to_chain_s", "p95_to_chain_s"),
                *("chains", "errors"),
            )
        }
    summary["prediction"] = {
        by: {group: spread_of_errors(rows, by) for group, rows in prediction_groups(cells).items() if rows}
        for by in ("by_mode_s", "by_round_s")
    }
    summary["against PETALS' modes"] = verdict(summary)
    return summary


def prediction_groups(cells: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """By mode, and all."""
    groups: dict[str, list[dict[str, Any]]] = {"all": []}
    for cell in cells:
        groups["all"] += cell.get("predictions", [])
        groups.setdefault(cell["mode"], []).extend(cell.get("predictions", []))
    return groups


def spread_of_errors(rows: Sequence[dict[str, Any]], by: str) -> dict[str, Any]:
    """(predicted - measured) / measured."""
    errors = [row[by] / row["measured_s"] - 1 for row in rows]
    return {
        "answers": len(rows),
        "median": round(statistics.median(errors), 3),
        "p5": round(float(np.percentile(errors, 5)), 3),
        "p95": round(float(np.percentile(errors, 95)), 3),
        "median_absolute": round(statistics.median(map(abs, errors)), 3),
    }


def verdict(summary: dict[str, Any]) -> dict[str, dict[str, bool]]:
    """The brief's check, at the highest load: no worse than PETALS' random walk in time per token, nor than PETALS'
    shortest chain in tokens per second.

    Of the walk's tokens most are those of its few quick clients, so a client's mean wait for a token is compared too.
    """
    last = [cells for name, cells in summary.items() if name.endswith("clients")][-1]
    if not {LATENCY, THROUGHPUT} <= last.keys():
        return {}
    walk, shortest = last[THROUGHPUT], last[LATENCY]
    return {
        mode: {
            "median token as quick": seen["p50_token_s"] <= walk["p50_token_s"],
            "mean client as quick": seen["tokens_per_s"] >= walk["tokens_per_s"],
            "as many tokens per second": seen["tokens_per_s"] >= shortest["tokens_per_s"],
        }
        for mode, seen in last.items()
        if mode not in (LATENCY, THROUGHPUT, PINNED)
    }


def figures(cells: Sequence[dict[str, Any]]) -> Iterator[Figure]:
    for quantity, title, label in (
        ("p50_token_s", "time per token, median", "seconds"),
        ("p95_token_s", "time per token, p95", "seconds"),
        ("tokens_per_s", "all clients together", "tokens/s"),
        ("p5_client_tokens_per_s", "the slowest twentieth of the clients", "tokens/s, each"),
    ):
        figure = Figure(title, "clients", label, log_x=True, log_y=True)
        for mode in dict.fromkeys(cell["mode"] for cell in cells):
            counts = sorted({cell["clients"] for cell in cells if cell["mode"] == mode})
            medians = [
                statistics.median(
                    cell[quantity] for cell in cells if (cell["mode"], cell["clients"]) == (mode, count)
                )
                for count in counts
            ]
            figure.add_line(mode, counts, medians)
        yield figure
    errors = Figure("predicted over measured, one client", "share of the answers", "predicted / measured")
    rows = prediction_groups(cells)["all"]
    for by, name in (
        ("by_mode_s", "by the mode (PETALS' model, but load)"),
        ("by_round_s", "by plait's round"),
    ):
        ratios = sorted(row[by] / row["measured_s"] for row in rows)
        errors.add_line(name, [(place + 0.5) / len(ratios) for place in range(len(ratios))], ratios)
    yield errors


def percentile(values: Sequence[float], share: float) -> float | None:
    """None where nothing was measured."""
    return float(np.percentile(values, share)) if values else None


def median_of(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    known = [row[name] for row in rows if row[name] is not None]
    return round(statistics.median(known), 4) if known else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--mode", nargs="*", default=list(MODES), choices=list(MODES))
    parser.add_argument("--rounds", type=int, default=2, help="of all cells, in another order each time")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="measured in a cell; twice as long with one client"
    )
    parser.add_argument("--warm-up", type=float, default=5.0, help="seconds of a cell before that")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--plan", action="store_true")
    options = parser.parse_args()
    if options.plan:
        print(json.dumps({f"{clients} clients": plan(clients) for clients in options.clients}, indent=1))
        return
    if options.quick:
        options.clients, options.rounds, options.seconds, options.warm_up = [1, 16], 1, 4.0, 2.0
    began_s = time.monotonic()
    cells: list[dict[str, Any]] = []
    rng = np.random.default_rng(0)
    with UnequalSwarm(LAYOUT) as swarm:
        print(f"the swarm stands after {time.monotonic() - began_s:.0f} s", flush=True)
        facts = announced(swarm)
        pinned = best_pinned(swarm)
        for number in range(options.rounds):
            for clients in options.clients:
                for index in rng.permutation(len(options.mode)):
                    mode = options.mode[int(index)]
                    route = {"pinned": pinned} if mode == PINNED else MODES[mode]
                    # A lone client has few answers, and predictions are compared with those.
                    measured_s = options.seconds * (2 if clients == 1 else 1)
                    cell = run_cell(swarm, mode, route, clients, options.warm_up, measured_s)
                    cells.append({"round": number} | cell)
                    print(json.dumps({name: cell[name] for name in list(cell)[:13]}), flush=True)
        facts |= {"pinned": pinned, "passes_late": swarm.late_fractions()}
    summary = summarise(cells) | {"announced": facts, "seconds": round(time.monotonic() - began_s)}
    if options.quick:
        print(json.dumps(summary, indent=1))
        return
    write_result(
        "routing_live",
        settings=vars(options)
        | {
            "layout": [
                [worker.name, worker.place, f"{worker.blocks.start}:{worker.blocks.stop}", worker.slowdown]
                for worker in LAYOUT.workers
            ],
            "rtts_s": {"-".join(sorted(places)): rtt_s for places, rtt_s in RTTS_S.items()},
            "block_pass_s": PASS_S,
            "block_row_s": ROW_S,
            "prompt_tokens": PROMPT_TOKENS,
            "answer_tokens": ANSWER_TOKENS,
            "evaluations": EVALUATIONS,
        },
        samples=cells,
        summary=summary,
        figures=list(figures(cells)),
    )


if __name__ == "__main__":
    main()
