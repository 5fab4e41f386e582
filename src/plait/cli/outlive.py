"""`plait demo --kill`: an answer that outlives a machine, shown to whoever does not believe it."""

import os
import signal
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plait.cli.terminal import say, say_piece
from plait.errors import BadSetup
from plait.units import format_s

if TYPE_CHECKING:
    from plait.client import ServerClient

QUESTION = "What does json.dumps do?"
ANSWER_TOKENS = 300
KILL_AT_CHUNK = 60


@dataclass(frozen=True, slots=True)
class Victim:
    """A machine of the swarm, and its process on this computer."""

    name: str
    process: int


def parse_victim(text: str) -> Victim:
    """Read NAME:PROCESS.

    Raises:
        BadSetup: it is none.
    """
    name, colon, process = text.rpartition(":")
    if not (name and colon and process.isascii() and process.isdecimal() and int(process) > 1):
        raise BadSetup(f"--kill {text!r} is no machine and process such as two:4711, which the demo prints")
    return Victim(name, int(process))


def outlive(base_url: str, api_key: str | None, victim: Victim) -> None:
    """Stream a long answer through a machine, kill the machine under way, and compare with an undisturbed answer.

    Raises:
        BadSetup: no swarm answers there, or the process is not there or not one's own.
    """
    from plait.client import ServerClient

    with ServerClient(base_url, api_key=api_key) as client:
        route = {"pinned": _chain_through(client, victim.name)}
        say(f"asking for {ANSWER_TOKENS} tokens through {' -> '.join(route['pinned'])}: {QUESTION}\n")
        pieces: list[str] = []
        killed_s = last_s = longest_s = 0.0
        with closing(_answer(client, route)) as chunks:
            for text in chunks:
                now_s = time.monotonic()
                if killed_s:
                    longest_s = max(longest_s, now_s - last_s)
                last_s = now_s
                pieces.append(text)
                say_piece(text)
                if len(pieces) == KILL_AT_CHUNK:
                    _kill(victim)
                    killed_s = last_s
                    say_piece(f"\n\n  [kill -9 {victim.process}: {victim.name} is dead]\n\n")
        say(f"\n\nthe answer went on; the longest pause after the kill was {format_s(longest_s)}")
        with closing(_answer(client, {})) as chunks:
            again = "".join(chunks)
        same = again == "".join(pieces)
        say(f"asked again without {victim.name}, the answer is {'the same' if same else 'ANOTHER ONE'}")


def _chain_through(client: "ServerClient", name: str) -> list[str]:
    """The chain that requests get now, if the machine `name` is in it, or else one that goes through it."""
    now = [hop["name"] for hop in client.post("/swarm/route", {})["chain"]]
    return now if name in now else chain_through(client.get("/swarm/status")["machines"], name)


def chain_through(machines: Sequence[dict[str, Any]], name: str) -> list[str]:
    """Names of machines whose spans follow each other through the model, with the machine `name` among them.

    Raises:
        BadSetup: there is no such machine, or no such chain.
    """
    spans = {
        machine["name"]: (machine["first_block"], machine["end_block"])
        for machine in machines
        if machine["state"] == "online" and machine["end_block"] > machine["first_block"]
    }
    if name not in spans:
        raise BadSetup(
            f"no machine {name!r} serves blocks of this swarm; there are {', '.join(spans) or 'none'}"
        )
    end_block = max(end for _, end in spans.values())
    own_first = spans[name][0]
    chain: list[str] = []
    block = 0
    while block < end_block:
        # Up to the machine's own first block by machines that end there at the latest, then by itself.
        following = (
            [name]
            if block == own_first
            else [
                other
                for other, (first, end) in spans.items()
                if first == block and (block > own_first or end <= own_first)
            ]
        )
        if not following:
            break
        chain.append(following[0])
        block = spans[chain[-1]][1]
    if block < end_block or name not in chain:
        raise BadSetup(f"no chain of whole machines goes through {name!r}; the demo says which are left")
    return chain


def _answer(client: "ServerClient", route: dict[str, Any]) -> Generator[str]:
    from plait.client import Message

    sampling: dict[str, Any] = {"temperature": 0, "max_tokens": ANSWER_TOKENS, "ignore_eos": True}
    if route:
        sampling["route"] = route
    model = client.models()[0]
    with closing(client.chat([Message("user", QUESTION)], model=model, sampling=sampling)) as chunks:
        for chunk in chunks:
            yield chunk.text


def _kill(victim: Victim) -> None:
    try:
        os.kill(victim.process, signal.SIGKILL)
    except ProcessLookupError:
        raise BadSetup(f"there is no process {victim.process}; the demo prints what to type") from None
    except PermissionError:
        raise BadSetup(f"process {victim.process} is not yours") from None
