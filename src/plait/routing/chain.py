"""Chains of hops, the front of those worth choosing from, and what a choice returns."""

import itertools
from dataclasses import dataclass
from typing import Literal

from plait.ids import PeerId

RouteMode = Literal["latency", "throughput", "exact", "tradeoff", "load", "pinned"]


@dataclass(frozen=True, slots=True)
class Hop:
    """One peer runs one span of blocks."""

    peer: PeerId
    span: range


Chain = tuple[Hop, ...]
"""Hops that cover every block of a range once, in order; no peer twice."""


def check_chain(chain: Chain, blocks: range) -> None:
    """Assert that a chain covers `blocks` once, in order, without an empty hop or a peer that comes twice."""
    assert chain and chain[0].span.start == blocks.start and chain[-1].span.stop == blocks.stop
    assert all(len(hop.span) > 0 and hop.span.step == 1 for hop in chain)
    assert all(hop.span.stop == after.span.start for hop, after in itertools.pairwise(chain))
    assert len({hop.peer for hop in chain}) == len(chain)


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontMember:
    """A chain and its value in each objective of its front, in the objective's own unit."""

    chain: Chain
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """Chains that no other known chain beats in every objective, ordered by the first one, best first.

    `exact`: proven to be all of them (one for each vector of values). Otherwise a search found these.
    """

    objectives: tuple[str, ...]
    members: tuple[FrontMember, ...]
    exact: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """What was chosen for one request.

    `front`: what it was chosen from. `expected_step_s`: predicted time of a decoding step through the chain, as the
    mode counts it. `reasons`: sentences for people.
    """

    chain: Chain
    mode: RouteMode
    front: Front
    expected_step_s: float
    reasons: tuple[str, ...]


def alternatives(front: Front, without: frozenset[PeerId]) -> tuple[FrontMember, ...]:
    """The front's members that avoid some peers, in its order."""
    return tuple(member for member in front.members if all(hop.peer not in without for hop in member.chain))
