"""The engine behind asyncio: streams, cancellation, failure and drain, with the real engine."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import plait.model
from plait.engine import Engine, EngineOptions, Matcher
from plait.errors import BadRequest, EngineFailure, NotReady
from plait.ids import RequestId
from plait.session import Constraint, GenerationRequest, RequestDelta, SamplingParams
from plait.worker import AsyncEngine, LoadProgress

OPTIONS = EngineOptions(
    folder=Path(plait.model.__file__).parent / "tiny", kv_cache_bytes=64 * 2**20, threads=1
)


def engine(options: EngineOptions = OPTIONS) -> AsyncEngine:
    return AsyncEngine(lambda on_progress: options, names=("tiny",))


def request(id: str, max_tokens: int = 8, prompt: tuple[int, ...] = (100, 101, 102)) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return GenerationRequest(id=RequestId(id), prompt_token_ids=prompt, sampling=sampling)


def constrained(id: str, regex: str) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=16, constraint=Constraint(kind="regex", text=regex))
    return GenerationRequest(id=RequestId(id), prompt_token_ids=(100, 101, 102), sampling=sampling)


async def collect(serving: AsyncEngine, wanted: GenerationRequest) -> list[RequestDelta]:
    return [delta async for delta in serving.generate(wanted)]


def run(test: Callable[[], Coroutine[object, object, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


async def until_idle(serving: AsyncEngine) -> None:
    while serving.status().running or serving.status().waiting or serving.status().kv_blocks_used:
        await asyncio.sleep(0.005)


def test_requests_stream_side_by_side() -> None:
    async def test() -> None:
        async with engine() as serving:
            assert await serving.wait_settled() == "ready"
            assert serving.model.max_model_tokens == 1024
            answers = await asyncio.gather(*(collect(serving, request(str(n), 12)) for n in range(8)))
            for deltas in answers:
                assert sum(len(part.token_ids) for delta in deltas for part in delta.sequences) == 12
                assert len(deltas) == 12
                assert deltas[-1].finished
                assert deltas[-1].timing is not None
                assert deltas[-1].timing.arrived_s <= deltas[-1].timing.first_token_s
            await until_idle(serving)
            assert serving.status().generated_tokens_total == 96

    run(test)


def test_closing_a_stream_frees_what_it_held() -> None:
    async def test() -> None:
        async with engine() as serving:
            await serving.wait_settled()
            async with aclosing(serving.generate(request("a", 1000))) as stream:
                async for _ in stream:
                    break
            await until_idle(serving)
            assert serving.status().generated_tokens_total < 1000

    run(test)


def test_a_refused_request_raises_and_disturbs_nobody() -> None:
    async def test() -> None:
        async with engine() as serving:
            await serving.wait_settled()
            other = asyncio.create_task(collect(serving, request("a", 20)))
            with pytest.raises(BadRequest, match="context is 1024 tokens"):
                await collect(serving, request("b", prompt=(100,) * 2000))
            assert (await other)[-1].finished

    run(test)


def test_streams_go_on_while_a_constraint_is_compiled() -> None:
    async def test() -> None:
        async with engine() as serving:
            await serving.wait_settled()
            started, may_end = threading.Event(), threading.Event()
            compile = Engine.compile

            def compile_slowly(self: Engine, constraint: Constraint) -> Matcher:
                started.set()
                assert may_end.wait(30)
                return compile(self, constraint)

            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(Engine, "compile", compile_slowly)
                slow = asyncio.create_task(collect(serving, constrained("a", "[0-9]{3}")))
                gone = asyncio.create_task(collect(serving, constrained("b", "[a-z]{3}")))
                assert await asyncio.to_thread(started.wait, 30)
                assert (await collect(serving, request("c", 20)))[-1].finished
                gone.cancel()
                may_end.set()
                text = "".join(part.text for delta in await slow for part in delta.sequences)
            assert len(text) == 3
            assert text.isdigit()
            await until_idle(serving)

    run(test)


def test_a_constraint_that_cannot_be_used_is_the_requests_own_error() -> None:
    async def test() -> None:
        async with engine() as serving:
            await serving.wait_settled()
            with pytest.raises(BadRequest, match="regular expression"):
                await collect(serving, constrained("a", "("))
            assert (await collect(serving, request("a", 4)))[-1].finished

    run(test)


def test_a_request_that_nobody_foresaw_ends_alone() -> None:
    async def test() -> None:
        async with engine() as serving:
            await serving.wait_settled()
            other = asyncio.create_task(collect(serving, request("a", 20)))
            with pytest.raises(EngineFailure, match="TypeError"):
                await collect(serving, request("b", prompt=("no", "ids")))
            assert (await other)[-1].finished
            assert serving.state == "ready"

    run(test)


def test_a_broken_step_fails_its_requests_and_the_next_one_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with engine() as serving:
            await serving.wait_settled()
            linear = torch.nn.functional.linear
            calls = 0

            def breaks_once(*arguments: object) -> torch.Tensor:
                nonlocal calls
                calls += 1
                if calls == 1:
                    raise RuntimeError("out of luck")
                return linear(*arguments)

            monkeypatch.setattr(torch.nn.functional, "linear", breaks_once)
            with pytest.raises(EngineFailure, match="out of luck"):
                await collect(serving, request("a"))
            assert (await collect(serving, request("b")))[-1].finished
            assert serving.state == "ready"
            await until_idle(serving)

    run(test)


def test_an_engine_that_only_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with engine() as serving:
            await serving.wait_settled()

            def breaks(*arguments: object) -> torch.Tensor:
                raise RuntimeError("no luck at all")

            monkeypatch.setattr(torch.nn.functional, "linear", breaks)
            for number in range(3):
                with pytest.raises(EngineFailure, match="no luck"):
                    await collect(serving, request(str(number)))
            while serving.state == "ready":
                await asyncio.sleep(0.005)
            with pytest.raises(NotReady, match="no luck"):
                await collect(serving, request("late"))

    run(test)


def test_draining_refuses_new_requests_and_lets_the_running_end() -> None:
    async def test() -> None:
        async with engine() as serving:
            await serving.wait_settled()
            running = asyncio.create_task(collect(serving, request("a", 50)))
            await asyncio.sleep(0)
            assert await serving.drain(30)
            with pytest.raises(NotReady, match="shutting down"):
                await collect(serving, request("b"))
            assert (await running)[-1].finished

    run(test)


def test_leaving_ends_what_still_runs_with_an_error() -> None:
    async def test() -> None:
        serving = engine()
        async with serving:
            await serving.wait_settled()
            running = asyncio.create_task(collect(serving, request("a", 1000)))
            await asyncio.sleep(0)
        with pytest.raises(NotReady, match="stopping"):
            await running

    run(test)


def test_a_model_that_cannot_be_loaded_is_a_state_and_a_reason(tmp_path: Path) -> None:
    async def test() -> None:
        async with engine(replace(OPTIONS, folder=tmp_path)) as serving:
            with pytest.raises(NotReady):
                await collect(serving, request("early"))
            assert await serving.wait_settled() == "failed"
            assert serving.failure is not None
            assert "config.json" in serving.failure.message

    run(test)


def test_progress_is_seen_while_loading() -> None:
    seen: list[LoadProgress] = []

    def options(on_progress: Callable[[LoadProgress], None]) -> EngineOptions:
        on_progress(LoadProgress("downloading", 1, 2))
        seen.append(serving.load_progress)
        return OPTIONS

    serving = AsyncEngine(options, names=("tiny",))

    async def test() -> None:
        async with serving:
            assert await serving.wait_settled() == "ready"
            assert serving.load_progress.done_bytes == serving.load_progress.total_bytes > 0

    run(test)
    assert seen == [LoadProgress("downloading", 1, 2)]
