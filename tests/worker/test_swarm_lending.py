"""A request several times longer than its machine's memory, over other machines: the tokens of one large machine."""

import asyncio

import pytest
from lending_rig import Lender, lending_swarm
from swarm_rig import on_one_machine, some_prompt, tiny_request

PROMPT, ANSWER = 100, 60


@pytest.mark.parametrize("carrier", ["mem", "tcp", "tls"])
def test_a_long_request_has_the_tokens_of_one_large_machine(carrier: str) -> None:
    async def main() -> None:
        request = tiny_request("long", some_prompt(PROMPT), ANSWER, temperature=0.0)
        expected = on_one_machine([request])["long"].token_ids
        lenders = {
            "a": Lender(kv_blocks=4, borrow_blocks=20),
            "b": Lender(kv_blocks=7, serves=False),
            "c": Lender(kv_blocks=8, serves=False),
        }
        async with lending_swarm(lenders, carrier=carrier) as rig:
            answer = await rig.ask(request)
            assert answer.token_ids == expected
            debtor = rig.hosts["a"].worker.lending
            assert debtor is not None and debtor.agent.counts.moved_out_total >= 6
            assert debtor.remote.query_bytes_total and not debtor.agent.counts.lost_total
            await rig.check_all_home()

    asyncio.run(asyncio.wait_for(main(), 120))
