"""Spans by PETALS' rule: the window is the right one, moves leave no gap, histories end near the optimum."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.cluster import PeerRates, PeerRecord, SwarmView, peer_id_of_name
from plait.errors import BadSetup
from plait.ids import PeerId
from plait.placement import better_span, block_throughputs, choose_span
from plait.placement.balance import peer_tokens_per_s


def serving(name: str, first: int, length: int, tokens_per_s: float, **fields: object) -> PeerRecord:
    """A peer that passes so many tokens per second through its span, in PETALS' measure."""
    return PeerRecord(
        peer=peer_id_of_name(name),
        name=name,
        model="m",
        first_block=first,
        end_block=first + length,
        rates=PeerRates(prefill_tokens_per_s=tokens_per_s * (length + 1) / 2),
        expires_unix_s=math.inf,
        **fields,  # type: ignore[arg-type]
    )


def view_of(*records: PeerRecord, blocks: int) -> SwarmView:
    return SwarmView.of(records, model="m", model_blocks=blocks, unix_now_s=0.0)


@st.composite
def swarms(draw: st.DrawFn) -> SwarmView:
    blocks = draw(st.integers(1, 9))
    records: list[PeerRecord] = []
    for number in range(draw(st.integers(0, 6))):
        length = draw(st.integers(1, blocks))
        first = draw(st.integers(0, blocks - length))
        rate = draw(st.sampled_from([1.0, 1.0, 2.0, 5.0]))
        state = draw(st.sampled_from(["online", "joining", "draining", "offline"]))
        records.append(serving(f"p{number}", first, length, rate, state=state))
    return view_of(*records, blocks=blocks)


@given(swarms(), st.integers(1, 12))
def test_a_joining_peer_takes_the_lexicographically_worst_window(view: SwarmView, length: int) -> None:
    span = choose_span(view, length)
    loads = block_throughputs(view).tolist()
    assert len(span) == min(length, view.model_blocks)
    windows = [sorted(loads[start : start + len(span)]) for start in range(view.model_blocks - len(span) + 1)]
    assert windows[span.start] == min(windows)
    assert span.start == windows.index(min(windows))


@given(swarms())
def test_loading_peers_count_and_leaving_ones_do_not(view: SwarmView) -> None:
    expected = np.zeros(view.model_blocks)
    for record in view.records.values():
        if record.state in ("online", "joining"):
            expected[record.first_block : record.end_block] += peer_tokens_per_s(record)
    assert block_throughputs(view) == pytest.approx(expected)


def test_throughput_is_petals() -> None:
    rates = PeerRates(prefill_tokens_per_s=900.0, network_tokens_per_s=200.0)
    peer = replace(serving("a", 0, 5, 1.0), rates=rates)
    assert peer_tokens_per_s(peer) == 200.0
    assert peer_tokens_per_s(replace(peer, end_block=17)) == 100.0
    assert peer_tokens_per_s(replace(peer, through=(peer_id_of_name("b"),))) == 40.0


def test_who_has_not_measured_itself_counts_as_the_median() -> None:
    new = replace(serving("new", 0, 4, 1.0, state="joining"), rates=PeerRates())
    others = [serving(f"p{number}", 0, 8, rate) for number, rate in enumerate((1.0, 3.0, 50.0))]
    assert block_throughputs(view_of(new, *others, blocks=8)).tolist() == [57.0] * 4 + [54.0] * 4
    # Two that join at once do not take the same blocks, though neither is measured.
    assert choose_span(view_of(new, blocks=8), 4) == range(4, 8)


def test_a_machine_that_holds_no_block_is_told_so() -> None:
    with pytest.raises(BadSetup, match="no block fits"):
        choose_span(view_of(blocks=4), 0)


def test_a_peer_moves_to_a_gap_and_stays_where_it_is_needed() -> None:
    rng = np.random.default_rng(0)
    twins = [serving(name, 0, 4, 1.0) for name in "ab"]
    view = view_of(*twins, blocks=8)
    assert better_span(view, twins[0].peer, 4, rng=rng) == range(4, 8)
    apart = view_of(twins[0], replace(twins[1], first_block=4, end_block=8), blocks=8)
    for record in apart.records.values():
        assert better_span(apart, record.peer, 4, rng=rng) is None
    assert better_span(view, peer_id_of_name("stranger"), 4, rng=rng) is None


def test_a_small_gain_moves_nobody() -> None:
    """Hysteresis: a move that makes the worst block 1.2 times as good is not worth a reload, one of 1.5 times is."""
    rng = np.random.default_rng(0)

    def moves(spare: float) -> bool:
        records = (
            serving("a", 0, 4, 2.0),
            serving("b", 4, 4, 2.0 - spare),
            serving("spare", 0, 4, spare),
        )
        view = view_of(*records, blocks=8)
        return better_span(view, records[2].peer, 4, rng=rng) is not None

    assert not moves(0.3)
    assert moves(0.9)


@pytest.mark.parametrize("histories", [8, pytest.param(300, marks=pytest.mark.slow)])
def test_histories_end_near_the_optimum_without_oscillation(histories: int) -> None:
    """PETALS' acceptance check: after random joins and leaves, the worst block has 0.75 of what the best layout
    gives it.

    The rule's own tolerance is a thousandth. A few histories cannot: whoever would have to move is the only holder
    of a block (`better_span`).
    """
    short = 0
    for seed in range(histories):
        rng = np.random.default_rng(seed)
        blocks = int(rng.integers(4, 9))
        alive = _history(rng, blocks)
        for _ in range(40):
            moved = _let_everybody_look(alive, blocks, rng)
            if not moved:
                break
        assert not moved, "it oscillates"
        worst = block_throughputs(view_of(*alive.values(), blocks=blocks)).min()
        best = _best_layout([(len(one.span), peer_tokens_per_s(one)) for one in alive.values()], blocks)
        if worst < (0.75 - 1e-3) * best - 1e-9:
            short += 1
            assert any(_is_only_holder(one, alive.values()) for one in alive.values())
    assert short <= histories // 50


def _history(rng: np.random.Generator, blocks: int) -> dict[str, PeerRecord]:
    alive: dict[str, PeerRecord] = {}
    for event in range(12):
        if not alive or (rng.random() < 0.7 and len(alive) < 6):
            length = int(rng.integers(1, blocks + 1))
            span = choose_span(view_of(*alive.values(), blocks=blocks), length)
            alive[f"p{event}"] = serving(f"p{event}", span.start, length, float(rng.lognormal(0, 0.7)))
        else:
            del alive[sorted(alive)[int(rng.integers(len(alive)))]]
    return alive


def _let_everybody_look(alive: dict[str, PeerRecord], blocks: int, rng: np.random.Generator) -> bool:
    moved = False
    for name in sorted(alive):
        view = view_of(*alive.values(), blocks=blocks)
        span = better_span(view, alive[name].peer, len(alive[name].span), rng=rng)
        if span is None:
            continue
        assert not _is_only_holder(alive[name], alive.values()) or block_throughputs(view).min() == 0, (
            "a move left a block to nobody"
        )
        alive[name] = replace(alive[name], first_block=span.start, end_block=span.stop)
        moved = True
    return moved


def _is_only_holder(one: PeerRecord, everybody: object) -> bool:
    others = [other for other in everybody if other is not one]  # type: ignore[attr-defined]
    return any(not any(block in other.span for other in others) for block in one.span)


def _best_layout(peers: list[tuple[int, float]], blocks: int) -> float:
    """Brute force: the best worst block over all ways to place the spans."""
    best = 0.0
    loads = np.zeros(blocks)

    def place(number: int) -> None:
        nonlocal best, loads
        if number == len(peers):
            best = max(best, float(loads.min()))
            return
        if loads.min() + sum(rate for _, rate in peers[number:]) <= best + 1e-9:
            return
        length, rate = peers[number]
        for start in range(blocks - length + 1):
            before = loads.copy()
            loads[start : start + length] += rate
            place(number + 1)
            loads = before

    place(0)
    return best


def test_bans_and_views_do_not_matter_to_who_holds_what() -> None:
    """Placement counts what is served, whoever this member avoids at the moment."""
    record = serving("a", 0, 4, 1.0)
    view = replace(view_of(record, blocks=4), banned=frozenset({PeerId(record.peer)}))
    assert block_throughputs(view).tolist() == [1.0] * 4
