"""The chain of every request, from the gateways' logs."""

import re
from dataclasses import dataclass

from plait.routing import Chain, Hop
from swarm.unequal import UnequalSwarm

_LINE = re.compile(r"request=(\S+) mode=(\S+) chain=(\S+) expected_s=(\S+) found_in_s=(\S+)")
_HOP = re.compile(r"(\w+)\[(\d+):(\d+)\]")


@dataclass(frozen=True, slots=True)
class FoundChain:
    """What a request got, how long a token should take by the mode's own count, and how long the choice took."""

    chain: Chain
    text: str
    expected_s: float
    found_in_s: float


class RouteLog:
    """Reads the logs of a swarm's gateways."""

    def __init__(self, swarm: UnequalSwarm) -> None:
        self._swarm = swarm

    def read(self) -> dict[str, FoundChain]:
        """By request, the first chain of each."""
        found: dict[str, FoundChain] = {}
        for gateway in self._swarm.origins:
            for request, _, hops, expected_s, found_in_s in _LINE.findall(self._swarm.machines[gateway].log):
                found.setdefault(request, self._chain(hops, float(expected_s), float(found_in_s)))
        return found

    def _chain(self, hops: str, expected_s: float, found_in_s: float) -> FoundChain:
        parts = [(self._swarm.names[peer], int(first), int(end)) for peer, first, end in _HOP.findall(hops)]
        return FoundChain(
            chain=tuple(Hop(self._swarm.peers[name], range(first, end)) for name, first, end in parts),
            text=" ".join(f"{name}[{first}:{end}]" for name, first, end in parts),
            expected_s=expected_s,
            found_in_s=found_in_s,
        )
