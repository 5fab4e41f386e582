"""A model divided over processes answers as the whole model does, and one lost process ends the others."""

import asyncio
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import plait.model
from plait import LLM, SamplingParams
from plait.engine import Engine, EngineOptions, RankPlan, TensorParallel, load_engine
from plait.errors import BadSetup, EngineFailure, EngineLost, NotReady
from plait.ids import RequestId
from plait.kernels import native_available
from plait.scheduling import StepLimits
from plait.session import GenerationRequest
from plait.worker import AsyncEngine
from plait.worker.tensor_parallel import TensorParallelGroup

pytestmark = pytest.mark.skipif(not native_available, reason="plait was installed without its CPU kernels")

TINY = Path(plait.model.__file__).parent / "tiny"
OPTIONS = EngineOptions(
    folder=TINY, dtype="bfloat16", kv_cache_bytes=16 * 2**20, packed_cache=False, threads=1
)
PROMPTS = (
    "def main():\n    ",
    "import os\nimport sys\n",
    "class Stack:\n",
    "for line in ",
    "if __name__ ==",
    "try:\n    import ",
)
LONG = "def area(width, height):\n    return width * height\n\n\n" * 6


def divided_options(size: int, **changes: Any) -> EngineOptions:
    parallel = TensorParallel(size=size, timeout_s=changes.pop("timeout_s", 20.0))
    return replace(OPTIONS, tensor_parallel=parallel, **changes)


@contextmanager
def divided(size: int, **changes: Any) -> Iterator[tuple[Engine, TensorParallelGroup]]:
    """An engine over so many processes."""
    options = divided_options(size, **changes)
    with TensorParallelGroup(options.tensor_parallel) as group:
        yield load_engine(options, group=group), group


@pytest.fixture(scope="module")
def two() -> Iterator[Engine]:
    """An engine over two processes that several tests use."""
    with divided(2) as (engine, _):
        yield engine


@cache
def whole(**changes: Any) -> Engine:
    """The same model in one process."""
    return load_engine(replace(OPTIONS, **changes))


def answers(engine: Engine, prompts: Sequence[str], **sampling: Any) -> dict[int, list[list[int]]]:
    """Token ids of every sequence of every prompt, all run together."""
    numbers = {}
    for number, prompt in enumerate(prompts):
        id = RequestId(f"{number}-{time.monotonic_ns()}")
        numbers[id] = number
        params = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": 32, **sampling})
        token_ids = tuple(engine.tokenizer.encode(prompt))
        engine.add(GenerationRequest(id=id, prompt_token_ids=token_ids, sampling=params))
    found: dict[int, dict[int, list[int]]] = {number: {} for number in numbers.values()}
    while engine.has_work:
        for delta in engine.step():
            for part in delta.sequences:
                found[numbers[delta.request_id]].setdefault(part.index, []).extend(part.token_ids)
        assert not engine.take_failures()
    return {number: [tokens for _, tokens in sorted(parts.items())] for number, parts in found.items()}


def follower(group: TensorParallelGroup) -> "subprocess.Popen[bytes]":
    """The only other rank."""
    (process,) = group.processes.values()
    return process


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children() -> list[int]:
    """Processes that this one has started and not waited for."""
    lists = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
    return [int(pid) for text in lists for pid in text.split()]


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def listening_addresses() -> set[str]:
    """Addresses of this process's listening TCP sockets, as the kernel writes them."""
    own = {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()
    ]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own}


# -- the same answers ------------------------------------------------------------------------------------


# Ranks add the same products in another order: the last bit of a float32 sum. That alone moves no logit by more than a
# millionth of their spread. But now and then such a sum lies so near the middle between two codes of an activation that
# it is rounded to the other one (bfloat16 has 2^-9 between them), and all later positions see the difference.
ORDER, ONE_CODE = 1e-6, 2**-8


def test_logits_are_those_of_the_whole_model(two: Engine) -> None:
    _check_logits(two)


@pytest.mark.slow
def test_logits_over_four_processes_are_those_of_the_whole_model() -> None:
    with divided(4) as (engine, _):
        _check_logits(engine)


def _check_logits(engine: Engine) -> None:
    differences = [_difference(engine, [token_id]) for token_id in range(100, 2000, 100)]
    assert sorted(differences)[len(differences) // 2] < ORDER
    assert max(*differences, _difference(engine, engine.tokenizer.encode(LONG))) < ONE_CODE


def _difference(engine: Engine, token_ids: list[int]) -> float:
    expected, found = whole().prompt_logits(token_ids), engine.prompt_logits(token_ids)
    return float((found - expected).abs().max() / (expected.max() - expected.min()))


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "int8", "int4", "int4-g128"])
def test_a_divided_model_is_as_exact_as_the_whole(quantization: str) -> None:
    """Of int8 a rank quantises its own inputs only, with a scale of their own: not the same numbers, but no worse."""
    token_ids = whole().tokenizer.encode(LONG)
    exact = whole(dtype="float32").prompt_logits(token_ids)
    error = (whole(quantization=quantization).prompt_logits(token_ids) - exact).abs().mean()
    with divided(2, quantization=quantization) as (engine, _):
        assert (engine.prompt_logits(token_ids) - exact).abs().mean() < 1.1 * error


def test_greedy_tokens_are_those_of_the_whole_model(two: Engine) -> None:
    assert answers(two, PROMPTS, max_tokens=200) == answers(whole(), PROMPTS, max_tokens=200)


def test_beams_are_those_of_the_whole_model(two: Engine) -> None:
    search = {"beam_width": 3, "n": 2}
    assert answers(two, PROMPTS[:3], **search) == answers(whole(), PROMPTS[:3], **search)


def test_a_sample_does_not_depend_on_what_else_is_in_the_batch(two: Engine) -> None:
    sampling = {"temperature": 0.9, "seed": 7, "n": 2, "top_k": 50, "top_p": 0.95}
    together = answers(two, PROMPTS, **sampling)
    assert [together[index] for index in range(3)] == [answers(two, [p], **sampling)[0] for p in PROMPTS[:3]]


def test_a_shared_prefix_is_computed_once_on_every_rank(two: Engine) -> None:
    before = two.status().prefix_hit_tokens_total
    prompts = [LONG + prompt for prompt in PROMPTS]
    first = answers(two, prompts[:1])
    rest = answers(two, prompts[1:])
    assert two.status().prefix_hit_tokens_total > before + 100
    alone = answers(whole(prefix_caching=False), prompts)
    assert [first[0], *rest.values()] == list(alone.values())


@pytest.mark.slow
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_preempted_sequences_go_on_as_if_nothing_had_been(preemption: Any) -> None:
    limits = StepLimits(step_tokens=64, max_running_sequences=6, preemption=preemption)
    small = {"kv_cache_bytes": 16 * 16 * 6 * 2 * 4 * 32 * 2, "swap_bytes": 2**22, "limits": limits}
    with divided(2, **small) as (engine, _):
        found = answers(engine, PROMPTS, max_tokens=60)
        assert engine.status().preemptions_total > 0
    assert found == answers(whole(), PROMPTS, max_tokens=60)


@pytest.mark.slow
def test_log_probabilities_are_those_of_the_whole_model() -> None:
    with ExitStack() as closing:
        params = SamplingParams(max_tokens=5, temperature=0.0, logprobs=3, prompt_logprobs=2)
        outputs = []
        for size in (1, 2):
            llm = closing.enter_context(LLM.from_options(divided_options(size)))
            outputs.append(llm.generate(PROMPTS[0], params)[0])
    (one,), (other,) = outputs[0].outputs, outputs[1].outputs
    assert one.token_ids == other.token_ids
    assert one.logprobs is not None and other.logprobs is not None
    for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
        assert mine.keys() == theirs.keys()
        for token in mine:  # logits are spread over 26
            assert mine[token].logprob == pytest.approx(theirs[token].logprob, abs=26 * ONE_CODE)


# -- the end ---------------------------------------------------------------------------------------------


def test_a_killed_rank_fails_the_step_with_its_name_and_leaves_nothing_behind() -> None:
    before = _shared_memory()
    _lose_a_rank()
    gc.collect()  # the exceptions hold the engine, and the engine the memory
    assert _shared_memory() == before
    assert not [name for name in os.listdir("/dev/shm") if "plait" in name]


def _lose_a_rank() -> None:
    with divided(2) as (engine, group):
        answers(engine, PROMPTS[:1])
        other = follower(group)
        engine.add(_request(engine))
        engine.step()
        other.kill()
        start_s = time.monotonic()
        with pytest.raises(EngineLost, match=r"rank 1 .*has ended.*SIGKILL.*start it again"):
            for _ in range(10):
                engine.step()
        assert time.monotonic() - start_s < 10.0  # 0.1 s on a quiet machine; the timeout is 20 s
        engine.abort_running()
        engine.add(_request(engine))
        with pytest.raises(EngineLost, match="rank 1"):
            engine.step()
        assert not is_running(other.pid)


@pytest.mark.slow
def test_a_rank_that_hangs_fails_the_step_at_the_deadline_and_is_ended() -> None:
    with divided(2, timeout_s=1.0) as (engine, group):
        other = follower(group)
        engine.add(_request(engine))
        engine.step()
        other.send_signal(signal.SIGSTOP)
        with pytest.raises(EngineLost, match=r"rank 1 \(process \d+\) has not answered for 1 s"):
            for _ in range(10):
                engine.step()
        assert not is_running(other.pid)


@pytest.mark.slow
def test_ranks_end_with_the_process_that_started_them() -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_tensor_parallel import divided\n"
        "with divided(2) as (engine, group):\n"
        "    print(*[process.pid for process in group.processes.values()], flush=True)\n"
        "    sys.stdin.read()\n"
    )
    leader = subprocess.Popen(
        [sys.executable, "-c", program, str(Path(__file__).parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert leader.stdout is not None
    pids = [int(pid) for pid in leader.stdout.readline().split()]
    assert len(pids) == 1
    leader.send_signal(signal.SIGKILL)
    leader.communicate()
    deadline_s = time.monotonic() + 20
    while is_running(pids[0]):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.mark.slow
def test_closing_ends_the_ranks_and_leaves_nothing_open() -> None:
    gc.collect()  # what earlier tests left open
    before = open_descriptors()
    with divided(2) as (engine, group):
        other = follower(group)
        answers(engine, PROMPTS[:1], max_tokens=3)
    assert other.returncode == 0
    assert open_descriptors() == before
    with pytest.raises(EngineLost, match="closed"):
        answers(engine, PROMPTS[:1])


@pytest.mark.slow
def test_a_server_whose_rank_was_killed_fails_its_requests_and_stops() -> None:
    others = set(children())

    async def serve() -> None:
        engine = AsyncEngine(lambda on_progress: divided_options(2), names=("tiny",))
        async with engine:
            assert await engine.wait_settled() == "ready"
            request = GenerationRequest(
                id=RequestId("one"),
                prompt_token_ids=(5, 6, 7),
                sampling=SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True),
            )
            stream = engine.generate(request)
            await anext(stream)
            (rank,) = set(children()) - others
            os.kill(rank, signal.SIGKILL)
            with pytest.raises(EngineFailure, match=r"rank 1 .*has ended"):
                async for _ in stream:
                    pass
            async with asyncio.timeout(20):
                while engine.state != "failed":
                    await asyncio.sleep(0.01)
            with pytest.raises(NotReady, match="rank 1"):
                await anext(engine.generate(replace(request, id=RequestId("two"))))

    asyncio.run(serve())
    assert set(children()) == others


def _request(engine: Engine) -> GenerationRequest:
    return GenerationRequest(
        id=RequestId(f"{time.monotonic_ns()}"),
        prompt_token_ids=tuple(engine.tokenizer.encode(PROMPTS[0])),
        sampling=SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True),
    )


def _shared_memory() -> int:
    return Path("/proc/self/maps").read_text().count("plait-tensor-parallel")


# -- what cannot be started ------------------------------------------------------------------------------


def test_a_model_that_cannot_be_divided_so_is_refused_before_any_process_starts() -> None:
    others = set(children())
    with pytest.raises(BadSetup, match="4 key-value heads"), divided(3):
        pass
    with (
        pytest.raises(BadSetup, match="--tensor-parallel-size 2 needs plait's CPU kernels"),
        divided(2, dtype="float32"),
    ):
        pass
    assert set(children()) == others


@pytest.mark.slow
def test_a_rank_that_finds_another_model_says_so() -> None:
    plan = RankPlan(
        ranks=2,
        folder=str(TINY),
        fingerprint="of another model",
        weight_format="bf16",
        kv_format="bf16",
        block_tokens=16,
        kv_blocks=4,
        host_kv_blocks=0,
        step_tokens=16,
        token_limit=2048,
        hidden=256,
        packed_cache=False,
        threads=1,
        timeout_s=5.0,
    )
    with TensorParallelGroup(TensorParallel(size=2)) as group:
        group.start(plan)
        with pytest.raises(BadSetup, match=r"rank 1 could not load .* is not the one that rank 0 serves"):
            group.lead(None, plan)  # type: ignore[arg-type]
    assert RankPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"ranks": "2"}', b"\xff"])
def test_what_is_no_plan_is_refused(text: bytes) -> None:
    with pytest.raises(BadSetup, match="install the same version"):
        RankPlan.from_json(text)


# -- over a network --------------------------------------------------------------------------------------


@contextmanager
def rank_elsewhere(port: int, *, model: str = "tiny") -> Iterator[subprocess.Popen[str]]:
    """Rank 1 of 2, as it is started on another machine; here it is this one."""
    arguments = ["--tensor-parallel-size", "2", "--tensor-parallel-rank", "1"]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "plait", "serve", model, "--threads", "1", *arguments),
            *("--tensor-parallel-address", f"127.0.0.1:{port}"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def over_network(port: int, timeout_s: float = 20.0) -> EngineOptions:
    parallel = TensorParallel(size=2, address=("127.0.0.1", port), timeout_s=timeout_s)
    return replace(OPTIONS, tensor_parallel=parallel)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_a_rank_elsewhere_gives_the_same_bits_and_ends_with_rank_0(two: Engine) -> None:
    port = free_port()
    options = over_network(port)
    with rank_elsewhere(port) as other:
        with TensorParallelGroup(options.tensor_parallel) as group:
            engine = load_engine(options, group=group)
            assert answers(engine, PROMPTS, max_tokens=50) == answers(two, PROMPTS, max_tokens=50)
            token_ids = engine.tokenizer.encode(LONG)
            assert torch.equal(engine.prompt_logits(token_ids), two.prompt_logits(token_ids))
            assert listening_addresses() == {"0100007F"}
        printed, _ = other.communicate(timeout=30)
        assert "rank 0 has stopped" in printed and other.returncode == 0


@pytest.mark.slow
def test_a_killed_rank_elsewhere_is_named() -> None:
    port = free_port()
    options = over_network(port)
    with rank_elsewhere(port) as other, TensorParallelGroup(options.tensor_parallel) as group:
        engine = load_engine(options, group=group)
        engine.add(_request(engine))
        engine.step()
        other.kill()
        with pytest.raises(EngineLost, match="rank 1 has ended or can no longer be reached"):
            for _ in range(10):
                engine.step()


@pytest.mark.slow
def test_a_hung_rank_elsewhere_is_named_at_the_deadline() -> None:
    port = free_port()
    options = over_network(port, timeout_s=1.0)
    with rank_elsewhere(port) as other, TensorParallelGroup(options.tensor_parallel) as group:
        engine = load_engine(options, group=group)
        engine.add(_request(engine))
        engine.step()
        other.send_signal(signal.SIGSTOP)
        with pytest.raises(EngineLost, match="rank 1 has not answered for 1 s"):
            for _ in range(10):
                engine.step()


def test_an_address_of_another_machine_cannot_be_listened_at() -> None:
    parallel = TensorParallel(size=2, address=("192.0.2.1", 29500))
    options = replace(OPTIONS, tensor_parallel=parallel)
    with (
        TensorParallelGroup(parallel) as group,
        pytest.raises(BadSetup, match=r"cannot listen at .*192\.0\.2\.1"),
    ):
        load_engine(options, group=group)
