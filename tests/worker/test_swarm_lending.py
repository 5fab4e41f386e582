"""A request several times longer than its machine's memory, over other machines: the tokens of one large machine."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from lending_rig import LIMITS, Lender, LendingRig, lending_swarm
from swarm_rig import Answer, Host, on_one_machine, some_prompt, tiny_request

from plait.errors import NoCapacity
from plait.kernels import native_available
from plait.session import GenerationRequest
from plait.worker.lending import WorkerLending

PROMPT, ANSWER = 100, 60
LONG = tiny_request("long", some_prompt(PROMPT), ANSWER, temperature=0.0)
SEEDED = tiny_request("seeded", some_prompt(PROMPT, 5), ANSWER, temperature=0.9, seed=3)
SHORT = tiny_request("short", some_prompt(20, 9), 30, temperature=0.0)
DEBTOR = Lender(kv_blocks=4, borrow_blocks=20)
"""64 tokens; the long requests have 160."""


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[int, list[int]]]:
    requests = [LONG, SEEDED, SHORT]
    return {id: answer.token_ids for id, answer in on_one_machine(requests, "float64").items()}


def lending_of(host: Host) -> WorkerLending:
    assert host.worker.lending is not None
    return host.worker.lending


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(240):
            await main()

    asyncio.run(bounded())


async def until_tokens(answer: Answer, count: int) -> None:
    while len(answer.token_ids.get(0, ())) < count:
        await asyncio.sleep(0.005)


async def ask_while(
    rig: LendingRig, request: GenerationRequest, at_token: int, act: Callable[[], Awaitable[object]]
) -> Answer:
    """Ask, and do something once so many tokens are there."""
    answer = Answer()
    asking = asyncio.ensure_future(rig.ask(request, answer))
    await until_tokens(answer, at_token)
    await act()
    return await asking


@pytest.mark.parametrize("carrier", ["mem", pytest.param("tcp", marks=pytest.mark.slow), "tls"])
def test_a_long_request_has_the_tokens_of_one_large_machine(carrier: str, expected) -> None:
    async def main() -> None:
        lenders = {
            "a": DEBTOR,
            "b": Lender(kv_blocks=7, serves=False),
            "c": Lender(kv_blocks=8, serves=False),
        }
        async with lending_swarm(lenders, carrier=carrier, dtype="float64") as rig:
            answer = await rig.ask(LONG)
            assert answer.token_ids == expected["long"]
            debtor = lending_of(rig.hosts["a"])
            assert debtor.agent.counts.moved_out_total >= 6 and not debtor.told().lost_total
            assert (await rig.ask(SEEDED)).token_ids == expected["seeded"]
            await rig.check_all_home()

    run(main)


@pytest.mark.skipif(not native_available, reason="plait's kernels are not built here")
def test_the_kernels_lend_and_borrow_too() -> None:
    """A machine with room for everything that also lends has the same bits: its kernels add up by KV blocks, too."""

    async def main() -> None:
        async with lending_swarm({"one": Lender(kv_blocks=16, borrow_blocks=1)}, dtype="bfloat16") as rig:
            alone = await rig.ask(LONG)
        lenders = {
            "a": DEBTOR,
            "b": Lender(kv_blocks=7, serves=False),
            "c": Lender(kv_blocks=8, serves=False),
        }
        async with lending_swarm(lenders, dtype="bfloat16") as rig:
            assert (await rig.ask(LONG)).token_ids == alone.token_ids
            assert lending_of(rig.hosts["a"]).agent.counts.moved_out_total >= 6
            await rig.check_all_home()

    run(main)


def test_queries_and_parts_are_as_many_bytes_as_the_formula_says(expected) -> None:
    """One holder: H values of d out for each layer and token that it attends, H of d + 2 back."""

    async def main() -> None:
        lenders = {"a": DEBTOR, "b": Lender(kv_blocks=16, serves=False)}
        async with lending_swarm(lenders, dtype="float64") as rig:
            assert (await rig.ask(LONG)).token_ids == expected["long"]
            debtor = lending_of(rig.hosts["a"])
            attention = rig.hosts["a"].engine.spec.blocks[0].attention
            out = attention.heads * attention.cached_dim * 8
            back = attention.heads * (attention.cached_dim + 2) * 8
            sent, came = debtor.remote.query_bytes_total, debtor.remote.part_bytes_total
            assert sent % out == 0 and came * out == sent * back
            layers, rows = len(rig.hosts["a"].engine.blocks), sent // out
            assert rows % layers == 0 and ANSWER <= rows // layers <= PROMPT + ANSWER

    run(main)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["pull", "plan"])
def test_two_long_requests_that_have_no_room_at_once_are_both_answered(policy, expected) -> None:
    """Each machine lends what the other's request needs: neither could go on, so one gives way."""

    async def main() -> None:
        limits = replace(LIMITS, options=replace(LIMITS.options, policy=policy))
        lender = Lender(kv_blocks=8, borrow_blocks=20, limits=limits)
        async with lending_swarm({"a": lender, "b": lender}, dtype="float64") as rig:
            answers = await asyncio.gather(rig.ask(LONG), rig.ask(SEEDED))
            assert [each.token_ids for each in answers] == [expected["long"], expected["seeded"]]
            await rig.check_all_home()

    run(main)


@pytest.mark.parametrize(
    "at_token", [pytest.param(1, marks=pytest.mark.slow), 25, pytest.param(45, marks=pytest.mark.slow)]
)
def test_a_creditor_that_dies_costs_time_and_no_token(at_token: int, expected) -> None:
    async def main() -> None:
        lenders = {
            "a": DEBTOR,
            "b": Lender(kv_blocks=12, serves=False),
            "c": Lender(kv_blocks=12, serves=False),
        }
        async with lending_swarm(lenders, dtype="float64") as rig:

            async def kill_a_creditor() -> None:
                lent = {
                    name: host.engine.loans.book.lent_blocks
                    for name, host in rig.hosts.items()
                    if host.engine.loans is not None
                }
                name = max(lent, key=lambda each: lent[each])
                assert lent[name]
                await rig.kill(name)
                del rig.hosts[name]

            answer = await ask_while(rig, LONG, at_token, kill_a_creditor)
            assert answer.token_ids == expected["long"]
            assert lending_of(rig.hosts["a"]).told().lost_total
            await rig.check_all_home()

    run(main)


def test_the_manager_may_die_and_another_knows_what_it_knew(expected) -> None:
    async def main() -> None:
        lenders = {name: Lender(kv_blocks=8, serves=False) for name in ("b", "c", "d")}
        async with lending_swarm({"a": DEBTOR, **lenders}, dtype="float64") as rig:
            loop = asyncio.get_running_loop()
            names = {host.peer: name for name, host in rig.hosts.items()}
            manager = names[min(names)]
            if manager == "a":  # it is the debtor itself: there is nobody to kill
                pytest.fail("choose names whose smallest peer is a creditor")

            async def kill_manager() -> None:
                await rig.kill(manager)
                del rig.hosts[manager]

            answer = await ask_while(rig, LONG, 20, kill_manager)
            assert answer.token_ids == expected["long"]
            assert (await rig.ask(SEEDED)).token_ids == expected["seeded"]
            heirs = {lending_of(host).agent.manager(loop.time()) for host in rig.hosts.values()}
            assert heirs == {min(host.peer for host in rig.hosts.values())}
            await rig.check_all_home()

    run(main)


def test_a_debtor_that_dies_has_nothing_any_more_when_its_lease_is_over(expected) -> None:
    async def main() -> None:
        lenders = {"a": DEBTOR, "b": Lender(kv_blocks=12, serves=False)}
        async with lending_swarm(lenders, dtype="float64") as rig:

            async def kill_debtor() -> None:
                await rig.add_lender("d", Lender(kv_blocks=16))
                assert lending_of(rig.hosts["b"]).told().lent_blocks
                await rig.kill("a")
                del rig.hosts["a"]
                rig.gateway.view_changed()

            answer = await ask_while(rig, LONG, 20, kill_debtor)
            assert answer.token_ids == expected["long"]
            await rig.check_all_home()

    run(main)


def test_a_creditor_that_leaves_gets_its_memory_back_while_it_is_used(expected) -> None:
    async def main() -> None:
        lenders = {
            "a": DEBTOR,
            "b": Lender(kv_blocks=10, serves=False),
            "c": Lender(kv_blocks=12, serves=False),
        }
        async with lending_swarm(lenders, dtype="float64") as rig:

            async def call_back() -> None:
                creditors = lending_of(rig.hosts["a"]).agent.creditors
                creditor = next(host for host in rig.hosts.values() if host.peer in creditors)
                assert creditor.worker.lent_blocks
                creditor.worker.drain()
                while creditor.worker.lent_blocks:
                    await asyncio.sleep(0.01)

            answer = await ask_while(rig, LONG, 10, call_back)
            assert answer.token_ids == expected["long"]
            recalled = sum(lending_of(host).told().recalled_total for host in rig.hosts.values())
            assert recalled >= 1
            await rig.check_all_home()

    run(main)


def test_a_request_that_nobody_lends_to_ends_with_a_clear_error() -> None:
    async def main() -> None:
        lender = Lender(kv_blocks=4, borrow_blocks=20, limits=replace(LIMITS, wait_s=0.5))
        async with lending_swarm({"a": lender}, dtype="float64") as rig:
            with pytest.raises(NoCapacity, match="no machine has lent them"):
                await rig.ask(LONG)
            assert (await rig.ask(SHORT)).finish[0][0] == "length"
            await rig.check_all_home()

    run(main)
