"""What a gateway counts of its sessions: by state, through which machines, and what a failover computed again."""

import asyncio
import logging

import pytest
from swarm_rig import Answer, cut_at, some_prompt, swarm, tiny_request

from plait.simulator import run_virtual

TOKENS = 40
PROMPT = some_prompt(20, 1)
TWICE = {**cut_at(3), "A": range(3), "B": range(3, 6)}


async def until(answer: Answer, tokens: int) -> None:
    while len(answer.token_ids.get(0, ())) < tokens:
        await asyncio.sleep(0)


def test_tokens_count_at_the_machines_that_they_went_through_and_a_replay_at_the_new_one() -> None:
    async def run() -> None:
        async with swarm(TWICE) as rig:
            gateway = rig.gateway
            answer = Answer()
            asking = asyncio.create_task(rig.ask(tiny_request("x", PROMPT, TOKENS), answer))
            while not gateway.counts().sessions:
                await asyncio.sleep(0)
            assert gateway.counts().sessions_by_state == {"opening": 1}
            await until(answer, 10)
            assert gateway.counts().sessions_by_state == {"flowing": 1}
            front, back = rig.chain()
            await rig.kill(back)
            while not gateway.counts().recoveries_total:
                await asyncio.sleep(0)
            assert gateway.counts().sessions_by_state == {"recovering": 1}
            await asking
            counts = gateway.counts()
            assert counts.sessions == 0 and counts.sessions_by_state == {}
            peers = {name: host.peer for name, host in rig.hosts.items()}
            assert counts.tokens_by_peer[peers[front]] == TOKENS
            through = counts.tokens_by_peer[peers[back]], counts.tokens_by_peer[peers[back.swapcase()]]
            assert sum(through) == TOKENS and 10 <= through[0] < TOKENS
            # The new hop computes all positions before the one that is sampled next, the other one none.
            assert counts.replayed_tokens_total == len(PROMPT) + through[0] - 1
            assert counts.recoveries_total == 1 and counts.banned_total == 1

    run_virtual(run())


def test_nothing_is_replayed_where_nothing_is_lost() -> None:
    async def run() -> None:
        async with swarm(cut_at(2, 4)) as rig:
            await rig.ask(tiny_request("x", PROMPT, TOKENS))
            counts = rig.gateway.counts()
            assert (counts.replayed_tokens_total, counts.recoveries_total) == (0, 0)
            assert set(counts.tokens_by_peer.values()) == {TOKENS}

    run_virtual(run())


def test_the_log_says_which_machines_serve_a_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "plait.worker.swarm_engine")

    async def run() -> list[str]:
        async with swarm(cut_at(2, 4)) as rig:
            await rig.ask(tiny_request("asked", PROMPT, TOKENS))
            return [rig.hosts[name].peer[:8] for name in ("a", "b", "c")]

    first, second, third = run_virtual(run())
    (line,) = [line for line in caplog.messages if "request=asked" in line]
    assert f"mode=load chain={first}[0:2],{second}[2:4],{third}[4:6] expected_s=" in line
