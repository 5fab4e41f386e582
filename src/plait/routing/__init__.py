"""Which chain of peers serves a request: one `choose_chain`, six modes.

chain.py         hops, chains, fronts, what a choice returns; a front's members that avoid a peer
wish.py          what a request asks of its route
choose.py        the choice; `Router` (router.py) keeps graphs and fronts from one choice to the next
graph.py         the swarm as numbers: servers, boundaries, links
costs.py         what a hop costs: PETALS' model exactly, and more; objectives.py names them
sweep.py         shortest chains: modes `latency` and, on the costs of load.py, `load`
front_search.py  mode `exact`: the whole front by label setting
evolution.py     mode `tradeoff`: NSGA-II and NSGA-III, on operators.py and seeds.py
random_walk.py   mode `throughput`;  pinned.py  mode `pinned`
joint.py         chains for several sessions at once
describe.py      what was chosen, as JSON;  standing.py  any chain beside the front
picks.py         which point of a front;  pareto.py  dominance and hypervolume;  path_values.py  costs of given paths
"""

from plait.routing.chain import (
    Chain,
    Front,
    FrontMember,
    Hop,
    Routed,
    RouteMode,
    alternatives,
    check_chain,
)
from plait.routing.choose import choose_chain
from plait.routing.costs import DEFAULT_DECODE_TOKENS_PER_S
from plait.routing.describe import routed_fields
from plait.routing.graph import delays_s
from plait.routing.joint import Assignment, JointFront, JointObjectiveName, assign_chains
from plait.routing.load import HOP_OVERHEAD_S, expected_round_s
from plait.routing.objectives import LATENCY_AND_THROUGHPUT, NETWORK_AND_COMPUTE, ObjectiveName
from plait.routing.pareto import hypervolume, nondominated, normalised_hypervolume
from plait.routing.picks import (
    Balanced,
    Budget,
    LatencyFirst,
    Pick,
    Sampled,
    ThroughputFirst,
    parse_pick,
)
from plait.routing.router import Router
from plait.routing.standing import Standing, standing_of
from plait.routing.wish import RouteWish, wish_of_fields

__all__ = [
    "DEFAULT_DECODE_TOKENS_PER_S",
    "HOP_OVERHEAD_S",
    "LATENCY_AND_THROUGHPUT",
    "NETWORK_AND_COMPUTE",
    "Assignment",
    "Balanced",
    "Budget",
    "Chain",
    "Front",
    "FrontMember",
    "Hop",
    "JointFront",
    "JointObjectiveName",
    "LatencyFirst",
    "ObjectiveName",
    "Pick",
    "RouteMode",
    "RouteWish",
    "Routed",
    "Router",
    "Sampled",
    "Standing",
    "ThroughputFirst",
    "alternatives",
    "assign_chains",
    "check_chain",
    "choose_chain",
    "delays_s",
    "expected_round_s",
    "hypervolume",
    "nondominated",
    "normalised_hypervolume",
    "parse_pick",
    "routed_fields",
    "standing_of",
    "wish_of_fields",
]
