"""A chain beside the front: values as the front counts them, and never better than all of it."""

import numpy as np
import pytest
from hypothesis import given
from small_swarms import small_swarms

from plait.cluster import SwarmView
from plait.routing import RouteMode, RouteWish, choose_chain, standing_of


@pytest.mark.parametrize("mode", ["load", "latency", "throughput"])
@given(view=small_swarms())
def test_no_chain_beats_the_front_that_it_is_shown_beside(mode: RouteMode, view: SwarmView) -> None:
    blocks = range(view.model_blocks)
    wish = RouteWish(mode=mode)
    chain = choose_chain(view, blocks, wish, rng=np.random.default_rng(1)).chain
    standing = standing_of(view, blocks, chain, wish)
    step_s, rate = standing.values
    assert standing.front.exact
    # No worse in both objectives (the second is a rate): some member of the front is at least as good.
    assert any(
        member.values[0] <= step_s * (1 + 1e-9) and member.values[1] >= rate * (1 - 1e-9)
        for member in standing.front.members
    )


@given(view=small_swarms())
def test_a_member_of_the_front_has_the_values_it_has_there(view: SwarmView) -> None:
    blocks = range(view.model_blocks)
    wish = RouteWish(mode="exact", objectives=("network_s", "compute_s", "hops"))
    for member in choose_chain(view, blocks, wish, rng=np.random.default_rng(1)).front.members:
        standing = standing_of(view, blocks, member.chain, wish)
        assert standing.values == pytest.approx(member.values)
