"""A machine that says it is fast and is not: answers stay right, and the next ones go another way."""

import asyncio
from collections.abc import Callable
from typing import Any

from swarm_rig import SwarmRig, on_one_machine, some_prompt, swarm, tiny_request

from plait.cluster import PeerRates
from plait.kernels import native_available
from plait.simulator import run_virtual
from plait.transport import MemoryNet

DTYPE = "bfloat16" if native_available else "float64"
FAST = PeerRates(decode_tokens_per_s=4000.0, prefill_tokens_per_s=9000.0, network_tokens_per_s=9000.0)
HONEST = PeerRates(decode_tokens_per_s=1000.0, prefill_tokens_per_s=5000.0, network_tokens_per_s=1000.0)


def takes(step_s: float) -> Callable[[Callable[[], Any]], Any]:
    async def run_step(call: Callable[[], Any]) -> Any:
        await asyncio.sleep(step_s)
        return call()

    return run_step


def test_a_machine_that_overstates_its_rates_is_left_out_of_the_next_chains() -> None:
    async def main() -> None:
        async with swarm(
            {"a": range(3)}, rig=SwarmRig(MemoryNet(), dtype=DTYPE, run_step=takes(0.003))
        ) as rig:
            rig.run_step = takes(0.2)
            await rig.add("liar", range(3, 6))
            rig.run_step = takes(0.003)
            await rig.add("b", range(3, 6))
            near = {host.peer: 0.001 for host in rig.hosts.values()}
            for name, rates in {"a": HONEST, "liar": FAST, "b": HONEST}.items():
                rig.say(name, rates=rates, rtts_s=near)
            chains: list[list[str]] = []
            for number in range(4):
                request = tiny_request(
                    f"r{number}", some_prompt(30, number), 40, temperature=1.0, seed=number
                )
                asking = asyncio.create_task(rig.ask(request))
                while not rig.gateway.chains() or not rig.chain():
                    await asyncio.sleep(0)
                chains.append(rig.chain())
                answer = await asking
                assert answer.token_ids[0] == on_one_machine([request], DTYPE)[str(request.id)].token_ids[0]
                await asyncio.sleep(2)
            assert chains == [["a", "liar"], *[["a", "b"]] * 3]

    run_virtual(main())
