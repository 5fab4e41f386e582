"""`plait route`: which machines would answer a request now, and what they were chosen from."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from plait.cli.swarm_commands import ApiKey, BaseUrl, open_gateway
from plait.cli.terminal import JsonFlag, print_json, print_table, say
from plait.errors import BadSetup
from plait.units import format_s


def route(
    swarm: Annotated[
        Path | None,
        typer.Argument(
            help="A swarm's description (YAML or JSON; what plait status --json prints is one); without it a running "
            "swarm is asked.",
            metavar="[FILE]",
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            "--mode",
            help="load, latency, throughput, exact, tradeoff or pinned; without it the gateway's own.",
        ),
    ] = None,
    pick: Annotated[
        str | None,
        typer.Option(
            "--pick",
            help="Which point of the front: balanced, latency-first, throughput-first, sampled, budget=0.4 or "
            "weights=0.7,0.3.",
        ),
    ] = None,
    objective: Annotated[
        list[str] | None, typer.Option("--objective", help="One axis of the front; give it several times.")
    ] = None,
    pinned: Annotated[
        str | None, typer.Option("--pinned", help="Names or ids of the machines, in order, apart by commas.")
    ] = None,
    max_hops: Annotated[
        int | None, typer.Option("--max-hops", help="Most machines in a chain of the front.")
    ] = None,
    need_tokens: Annotated[
        int, typer.Option("--need-tokens", help="Prompt and answer together; 0 is not known.")
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Of what a mode draws; for a file.")] = 0,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    json: JsonFlag = False,
) -> None:
    """Show the chain that a request would get now from a swarm, and the front it is chosen from."""
    asked: dict[str, object] = {
        "mode": mode,
        "pick": pick,
        "objectives": objective or None,
        "pinned": pinned.split(",") if pinned else None,
        "max_hops": max_hops,
    }
    wish = {name: value for name, value in asked.items() if value is not None}
    if swarm is not None:
        routed = _routed_in_file(swarm, wish, need_tokens, seed)
    else:
        with open_gateway(base_url, api_key) as gateway:
            routed = gateway.post("/swarm/route", {"route": wish, "need_tokens": need_tokens})
    if json:
        print_json(routed)
        return
    _print_routed(routed)


def _routed_in_file(file: Path, wish: Mapping[str, object], need_tokens: int, seed: int) -> Mapping[str, Any]:
    """Choose here, in a swarm that is described in a file."""
    import numpy as np
    import yaml

    from plait.cluster import swarm_of_description
    from plait.routing import RouteWish, choose_chain, routed_fields, wish_of_fields

    try:
        # The C loader, where it is built in: a swarm of hundreds takes the other one seconds.
        description = yaml.load(file.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as error:
        raise BadSetup(f"cannot read {file}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise BadSetup(f"{file} is neither YAML nor JSON: {error}") from error
    try:
        view = swarm_of_description(description)
    except BadSetup as error:
        raise BadSetup(f"{file}: {error.message}") from error
    asked = replace(wish_of_fields(wish, RouteWish(), view), need_tokens=need_tokens)
    began_s = time.perf_counter()
    routed = choose_chain(view, range(view.model_blocks), asked, rng=np.random.default_rng(seed))
    return {**routed_fields(routed, view), "route_s": time.perf_counter() - began_s}


def _print_routed(routed: Mapping[str, Any]) -> None:
    chain, front = routed["chain"], routed["front"]
    say(f"{routed['mode']}: {_chain_text(chain)}")
    if routed["expected_round_s"] is not None:
        say(f"expected time for each token: {format_s(routed['expected_round_s'])}")
    say(f"chosen in {format_s(routed['route_s'])}")
    for reason in routed["reasons"]:
        say(f"  {reason}")
    if len(front["members"]) > 1:
        kind = "whole front" if front["exact"] else "front as far as it was searched"
        say()
        say(f"{kind}, {len(front['members'])} chains:")
        rows = [
            (
                "*" if member["chain"] == chain else "",
                *("-" if value is None else f"{value:.4g}" for value in member["values"]),
                _chain_text(member["chain"]),
            )
            for member in front["members"]
        ]
        print_table(("", *front["objectives"], "chain"), rows)


def _chain_text(chain: Sequence[Mapping[str, Any]]) -> str:
    return " -> ".join(
        f"{hop['name'] or hop['peer'][:12]} {hop['first_block']}:{hop['end_block']}" for hop in chain
    )
