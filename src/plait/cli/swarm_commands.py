"""`plait status` and `plait leave`: a running swarm, asked and told through its gateway."""

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.chat import DEFAULT_BASE_URL
from plait.cli.terminal import JsonFlag, print_json, print_table, say
from plait.units import format_bytes, format_s

if TYPE_CHECKING:
    from plait.client import ServerClient

BaseUrl = Annotated[
    str | None,
    typer.Option("--base-url", help="The swarm's gateway, such as http://127.0.0.1:8000/v1.", metavar="URL"),
]
ApiKey = Annotated[str | None, typer.Option("--api-key", help="Key of that server.", metavar="KEY")]
_HEADINGS = ("machine", "blocks", "state", "rtt", "memory", "context free", "tokens/s", "sessions", "peer")


def open_gateway(base_url: str | None, api_key: str | None) -> "ServerClient":
    """The gateway named, that of OPENAI_BASE_URL, or the one on this machine's usual port."""
    from plait.client import ServerClient

    if base_url is None and "OPENAI_BASE_URL" in os.environ:
        # The key of the environment goes only to the server of the environment.
        base_url, api_key = os.environ["OPENAI_BASE_URL"], api_key or os.environ.get("OPENAI_API_KEY")
    return ServerClient(base_url or DEFAULT_BASE_URL, api_key=api_key)


def status(
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    ticket: Annotated[bool, typer.Option("--ticket", help="Print a new line to join with instead.")] = False,
    advice: Annotated[
        bool, typer.Option("--advice", help="Say which machines to use and why each serves what it does.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Show a swarm: machines and what they serve, links, sessions.

    tokens/s is what one block of the model does there with one session; context free counts tokens.
    """
    with open_gateway(base_url, api_key) as gateway:
        if ticket:
            text = gateway.get("/swarm/ticket")["ticket"]
            print_json({"ticket": text}) if json else say(f"plait join {text}")
            return
        if advice:
            given = gateway.get("/swarm/advice")
            sentences = [*given["sentences"], *(machine["why"] for machine in given["machines"])]
            print_json(given) if json else say("\n".join(sentences))
            return
        swarm = gateway.get("/swarm/status")
    if json:
        print_json(swarm)
        return
    missing = f", blocks {swarm['missing_blocks']} MISSING" if swarm["missing_blocks"] else ""
    say(f"{swarm['model']}: {swarm['blocks']} blocks on {len(swarm['machines'])} machines{missing}")
    say(
        f"{swarm['sessions']} sessions now, {swarm['sessions_total']} so far, {swarm['recoveries_total']} recoveries, "
        f"{swarm['tokens_per_s']:.0f} tokens/s, route mode {swarm['route_mode']}"
    )
    say()
    print_table(_HEADINGS, [_machine_row(machine) for machine in swarm["machines"]])
    names = {machine["peer"]: machine["name"] for machine in swarm["machines"]}
    links = [
        (names[link["from"]], names[link["to"]], format_s(link["rtt_s"]))
        for link in swarm["links"]
        if link["rtt_s"] is not None and link["from"] in names and link["to"] in names
    ]
    if links:
        say()
        print_table(("link from", "to", "rtt"), links)


def leave(
    machine: Annotated[str, typer.Argument(help="Its name, its id, or the beginning of its id.")],
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    json: JsonFlag = False,
) -> None:
    """Tell a machine to leave its swarm: it takes no new sessions, hands over those it has, and stops.

    The machine's own Ctrl-C does the same.
    """
    with open_gateway(base_url, api_key) as gateway:
        told = gateway.post("/swarm/leave", {"peer": machine})
    if json:
        print_json(told)
    else:
        say(f"{machine} ({told['peer'][:12]}) was told to leave; plait status shows when it has")


def _machine_row(machine: dict[str, Any]) -> tuple[str, ...]:
    has_span = machine["end_block"] > machine["first_block"]
    marks = [
        word for word, holds in (("gateway", machine["is_gateway"]), ("banned", machine["banned"])) if holds
    ]
    rate = machine["decode_tokens_per_s"]
    cache = (
        f"{machine['kv_free_tokens']} of {machine['kv_total_tokens']}" if machine["kv_total_tokens"] else "-"
    )
    lending = machine["lending"]
    if lending is not None:
        cache += f", {lending['lent_blocks']} blocks lent, {lending['borrowed_blocks']} borrowed"
    return (
        machine["name"] + (f" ({', '.join(marks)})" if marks else ""),
        f"{machine['first_block']}:{machine['end_block']}" if has_span else "-",
        _state(machine),
        format_s(machine["rtt_s"]) if machine["rtt_s"] is not None else "-",
        format_bytes(machine["memory_bytes"]),
        cache,
        f"{rate:.0f}" if rate else "-",
        str(machine["sessions"]),
        machine["peer"][:12],
    )


def _state(machine: dict[str, Any]) -> str:
    """What it is doing, and how far it is."""
    loading = machine["loading"]
    if loading is None or not loading["total_bytes"]:
        return str(machine["state"])
    return f"{machine['state']} {loading['done_bytes'] / loading['total_bytes']:.0%}"
