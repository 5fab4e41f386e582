"""What tensor parallelism costs and gains: two processes on this machine, and a model of more.

1. Traffic: bytes of a decoding token between rank 0 and the others, counted: token ids against embeddings, best tokens
   against all logits, and the sums. (He et al. 2024, "Inference Performance Optimization for Large Language Models on
   CPUs", section 2.3, sends ids and gathers the best.)
2. Sums: the time to add up float32 [tokens, 2048] over two ranks, in shared memory and through gloo.
3. Speed: decoding and prefill of Llama's shape at 1.1 billion weights, one process with two threads against two with
   one each.
4. Latency: the same decoding when every sum waits for a link first.
5. Model: the paper's Llama2-70B on 2 and on 8 sockets (249.7 and 87.7 ms a token, 2.85 times) from the memory that a
   decoding token reads, at the part of memory's speed that ours was measured to reach, and what the sums take.

    python bench/tensor_parallel.py            about 10 minutes on two cores
"""

import argparse
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers.checkpoints import LLAMA_1_1B, block_weights, ensure_llama, head_weights
from peers.machine import OtherLoad, Probe, preferred_session, wait_until_quiet
from results import Figure, write_result

from plait.engine import Engine, EngineOptions, TensorParallel, load_engine
from plait.ids import RequestId
from plait.kernels import _native
from plait.scheduling import StepLimits
from plait.session import GenerationRequest, SamplingParams
from plait.worker.follower import follow
from plait.worker.gloo_link import GlooLink
from plait.worker.rank_links import GroupSizes
from plait.worker.tensor_parallel import TensorParallelGroup

HIDDEN = LLAMA_1_1B["hidden_size"]
LAYERS = LLAMA_1_1B["num_hidden_layers"]
SUMS_PER_STEP = 2 * LAYERS
SIZES_TOKENS = (1, 4, 16, 64, 128, 256, 512)
DELAYS_S = (0.0, 0.0001, 0.001, 0.005)
CONTEXT_TOKENS = 128
PREFILL_TOKENS = 512
DECODED_TOKENS = 24
SHARED = "shared memory"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--model", type=Path, help="checkpoint of Llama's shape; written if it is not there")
    parser.add_argument("--quantization", default="int8", choices=("none", "int8", "int4", "int4-g128"))
    parser.add_argument("--quiet-wait", type=float, default=60, help="seconds to wait for others to be idle")
    parser.add_argument("--nice", type=int, default=0, help="weight of this session; -15 keeps others out")
    parser.add_argument("--follow", nargs=2, metavar=("PORT", "DELAY_S"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.follow:
        port, delay_s = int(arguments.follow[0]), float(arguments.follow[1])
        follow(DelayedLink(1, port, delay_s))
        return
    quiet = Quiet(arguments.quiet_wait, arguments.nice)
    peers_root = Path(os.environ.get("PEERS_ROOT", Path.home() / "peers"))
    folder = ensure_llama(arguments.model or peers_root / "models/llama-1.1b")
    options = EngineOptions(
        folder=folder,
        dtype="bfloat16",
        quantization=arguments.quantization,
        kv_cache_bytes=128 * 2**20,
        prefix_caching=False,
        limits=StepLimits(step_tokens=PREFILL_TOKENS, max_running_sequences=8),
    )
    sums = measure_sums(arguments.repetitions, quiet)
    speed, traffic = measure_engines(options, arguments.repetitions, quiet)
    delayed = measure_delays(options, arguments.repetitions, quiet)
    with Probe(1) as probe, quiet.time():
        reads_gb_per_s = statistics.median(probe.measure("read") for _ in range(9))
    one_thread_s = median_of(speed, "one process, one thread", "decode_s")
    model = model_of_the_paper(sums, reads_gb_per_s, one_thread_s, arguments.quantization)
    write_result(
        "tensor_parallel",
        settings={
            "model": "Llama shape, 1.1 billion random weights",
            "quantization": arguments.quantization,
            "context_tokens": CONTEXT_TOKENS,
            "prefill_tokens": PREFILL_TOKENS,
            "repetitions": arguments.repetitions,
        },
        samples={"sums": sums, "speed": speed, "delayed": delayed},
        summary={
            "traffic_bytes_per_decoded_token": traffic,
            "sum_us_median_and_best": {
                way: {
                    str(size): [round(1e6 * statistics.median(times), 1), round(1e6 * min(times), 1)]
                    for size, times in by_size.items()
                }
                for way, by_size in sums.items()
            },
            "speed": {
                name: {
                    "decode_ms": round(1e3 * median_of(speed, name, "decode_s"), 2),
                    "prefill_tokens_per_s": round(PREFILL_TOKENS / median_of(speed, name, "prefill_s"), 1),
                }
                for name in speed
            },
            "decode_ms_by_link_latency_ms_median_and_best": {
                f"{1e3 * delay_s:g}": [round(1e3 * statistics.median(times), 2), round(1e3 * min(times), 2)]
                for delay_s, times in delayed.items()
            },
            "model_of_70b": model,
        },
        figures=figures(sums, delayed),
    )


@dataclass(frozen=True, slots=True)
class Quiet:
    """How measurements share the machine with others."""

    wait_s: float
    nice: int

    @contextmanager
    def time(self) -> Iterator[None]:
        """A while in which others are idle, or weigh little."""
        wait_until_quiet(self.wait_s)
        with preferred_session(self.nice):
            yield


def median_of(speed: dict[str, dict[str, list[float]]], name: str, what: str) -> float:
    return statistics.median(speed[name][what])


# -- 2. sums -----------------------------------------------------------------------------------------------


def measure_sums(repetitions: int, quiet: Quiet) -> dict[str, dict[int, list[float]]]:
    """Seconds of a sum over two ranks by way and tokens; the ranks are this process and one that it forks."""
    port = free_port()
    memory_fd = os.memfd_create("plait-bench", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    most = HIDDEN * max(SIZES_TOKENS)
    _native.SharedMemoryCollective.prepare(memory_fd, 2, most, 64)
    other = multiprocessing.get_context("fork").Process(
        target=run_sums, args=(1, memory_fd, port, repetitions), daemon=True
    )
    other.start()
    with quiet.time():
        found = run_sums(0, memory_fd, port, repetitions)
    other.join()
    os.close(memory_fd)
    return found


def run_sums(rank: int, memory_fd: int, port: int, repetitions: int) -> dict[str, dict[int, list[float]]]:
    torch.set_num_threads(1)
    most = HIDDEN * max(SIZES_TOKENS)
    shared = _native.SharedMemoryCollective(memory_fd, rank, 2, most, 64, 60.0)
    link = DelayedLink(rank, port, 0.0)
    ours = link.open_sums(GroupSizes(max_floats=most, max_gather_bytes=1), 60.0)
    gloo = link._peers.group
    cores = sorted(os.sched_getaffinity(0))
    found: dict[str, dict[int, list[float]]] = {}
    for tokens in SIZES_TOKENS * repetitions:
        numbers, out = np.ones(tokens * HIDDEN, np.float32), np.zeros(tokens * HIDDEN, np.float32)
        tensor, parts = torch.from_numpy(numbers.copy()), [torch.from_numpy(out.copy()) for _ in range(2)]
        ways: dict[str, Callable[[], object]] = {
            SHARED: lambda numbers=numbers, out=out: shared.add_sum(numbers, out),
            "gloo, rank by rank": lambda numbers=numbers, out=out: ours.add_sum(numbers, out),
            "gloo all_gather": lambda tensor=tensor, parts=parts: gloo.allgather([parts], [tensor]).wait(
                timedelta(seconds=60)
            ),
            "gloo all_reduce": lambda tensor=tensor: gloo.allreduce([tensor]).wait(timedelta(seconds=60)),
        }
        rounds = 200 if tokens <= 16 else 40
        for name, run in ways.items():
            # As ranks are: a core each. Gloo has threads of its own, which want to go where there is room.
            os.sched_setaffinity(0, {cores[rank % len(cores)]} if name == SHARED else cores)
            shared.gather(b"")  # both begin at once
            times = [timed(run) for _ in range(rounds)]
            found.setdefault(name, {}).setdefault(tokens, []).append(statistics.median(times))
    os.sched_setaffinity(0, cores)
    shared.gather(b"")
    link.close()
    return found


def timed(run: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    run()
    return time.perf_counter() - start_s


# -- 1. and 3. engines -------------------------------------------------------------------------------------


def measure_engines(
    options: EngineOptions, repetitions: int, quiet: Quiet
) -> tuple[dict[str, dict[str, list[float]]], dict[str, Any]]:
    """Seconds of decoding and of prefill by arrangement, interleaved; and the traffic of two ranks."""
    speed: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as closing:
        divided = replace(options, threads=1, tensor_parallel=TensorParallel(size=2))
        group = closing.enter_context(TensorParallelGroup(divided.tensor_parallel))
        two_ranks = load_engine(divided, group=group)
        engines = {
            "one process, two threads": load_engine(replace(options, threads=2)),
            "two processes, one thread each": two_ranks,
            "one process, one thread": load_engine(replace(options, threads=1)),
        }
        for engine in engines.values():
            run_once(engine)
        for _ in range(repetitions):
            for name, engine in engines.items():
                with quiet.time(), OtherLoad() as load:
                    decode_s, prefill_s = run_once(engine)
                samples = speed.setdefault(name, {"decode_s": [], "prefill_s": [], "foreign_cores": []})
                samples["decode_s"].append(decode_s)
                samples["prefill_s"].append(prefill_s)
                samples["foreign_cores"].append(load.foreign_cores)
        return speed, count_traffic(two_ranks)


def run_once(engine: Engine) -> tuple[float, float]:
    """Seconds of a decoding step at a short context, and of a prompt's prefill."""
    add(engine, CONTEXT_TOKENS, DECODED_TOKENS, temperature=0.0)
    steps: list[float] = []
    while engine.has_work:
        steps.append(timed(engine.step))
    add(engine, PREFILL_TOKENS, 1, temperature=0.0)
    prefill_s = timed(engine.step)
    assert not engine.has_work
    return statistics.median(steps[1:]), prefill_s


def add(engine: Engine, prompt_tokens: int, output_tokens: int, *, temperature: float) -> None:
    prompt = np.random.default_rng(0).integers(10, 2000, prompt_tokens).tolist()
    sampling = SamplingParams(
        max_tokens=output_tokens, temperature=temperature, top_k=50, ignore_eos=True, seed=1
    )
    id = RequestId(str(time.monotonic_ns()))
    engine.add(GenerationRequest(id=id, prompt_token_ids=tuple(prompt), sampling=sampling))


def count_traffic(engine: Engine) -> dict[str, Any]:
    """Bytes of a decoding token to one other rank and back, and what the same would be without our savings."""
    decoder = engine._decoder
    counted: dict[str, float] = {}
    for name, temperature in (("best", 0.0), ("all", 1.0)):
        add(engine, CONTEXT_TOKENS, DECODED_TOKENS, temperature=temperature)
        engine.step()  # the prompt
        sent, received = decoder.sent_bytes, decoder.received_bytes
        while engine.has_work:
            engine.step()
        counted[f"sent {name}"] = (decoder.sent_bytes - sent) / (DECODED_TOKENS - 1)
        counted[f"received {name}"] = (decoder.received_bytes - received) / (DECODED_TOKENS - 1)
    return {
        "step message with the token's id": round(counted["sent best"], 1),
        "the same with its float32 embedding": round(counted["sent best"] - 4 + 4 * HIDDEN, 1),
        "best token": counted["received best"],
        "slice of the logits": counted["received all"],
        "sums, each way": SUMS_PER_STEP * 4 * HIDDEN,
    }


# -- 4. latency --------------------------------------------------------------------------------------------


class DelayedLink(GlooLink):
    """Two ranks on this machine whose every sum waits for a slower link first."""

    def __init__(self, rank: int, port: int, delay_s: float) -> None:
        super().__init__(rank, 2, ("127.0.0.1", port), join_timeout_s=300.0)
        self._delay_s = delay_s

    def _exchange(self, timeout_s: float) -> Callable[[np.ndarray], None]:
        exchange, delay_s = super()._exchange(timeout_s), self._delay_s

        def wait_then_exchange(terms: np.ndarray) -> None:
            end_s = time.perf_counter() + delay_s
            while time.perf_counter() < end_s:  # sleeping would take longer by as much as a short link
                pass
            exchange(terms)

        return wait_then_exchange


class DelayedGroup(TensorParallelGroup):
    def __init__(self, options: TensorParallel, delay_s: float) -> None:
        super().__init__(options)
        self._delay_s = delay_s

    def _connect(self) -> DelayedLink:
        assert self._options.address is not None
        return DelayedLink(0, self._options.address[1], self._delay_s)


@contextmanager
def delayed_engine(options: EngineOptions, delay_s: float) -> Iterator[Engine]:
    port = free_port()
    parallel = TensorParallel(size=2, address=("127.0.0.1", port))
    divided = replace(options, threads=1, tensor_parallel=parallel)
    other = subprocess.Popen([sys.executable, __file__, "--follow", str(port), str(delay_s)])
    try:
        with DelayedGroup(parallel, delay_s) as group:
            yield load_engine(divided, group=group)
        other.wait(60)
    finally:
        other.kill()
        other.wait()


def measure_delays(options: EngineOptions, repetitions: int, quiet: Quiet) -> dict[float, list[float]]:
    """Seconds of a decoding step by the latency of the link."""
    found: dict[float, list[float]] = {}
    for delay_s in DELAYS_S:
        with delayed_engine(options, delay_s) as engine:
            run_once(engine)
            with quiet.time():
                found[delay_s] = [run_once(engine)[0] for _ in range(repetitions)]
    return found


# -- 5. the paper's eight sockets --------------------------------------------------------------------------

# Llama2-70B: 80 layers, hidden 8192, 64 heads of which 8 for keys, inner 28672, vocabulary 32000.
LLAMA_70B = LLAMA_1_1B | {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 28672,
}
PAPER_MS = {2: 249.7, 8: 87.7}
# Eight channels of DDR5-5600, 8 bytes each: the data sheet of the fifth-generation Xeons that the paper used.
SOCKET_GB_PER_S = 8 * 5.6 * 8


@dataclass(frozen=True, slots=True)
class Link:
    """One way of a small message, and what it carries."""

    one_way_s: float
    bytes_per_s: float


# Figures of their kinds, as published; None is the memory of one host.
LINKS: dict[str, Link | None] = {
    "all in one host": None,
    "100 Gb/s InfiniBand, 2 us": Link(2e-6, 12.5e9),
    "100 Gb/s Ethernet with RDMA, 5 us": Link(5e-6, 12.5e9),
    "25 Gb/s Ethernet over TCP, 30 us": Link(30e-6, 3.125e9),
    "10 Gb/s Ethernet over TCP, 50 us": Link(50e-6, 1.25e9),
}


def model_of_the_paper(
    sums: dict[str, dict[int, list[float]]], reads_gb_per_s: float, decode_s: float, quantization: str
) -> dict[str, Any]:
    """Milliseconds of a token on 2 and on 8 sockets: what a rank reads of its memory, and 160 sums.

    Reading goes at the part of memory's speed that one thread of ours reached, or at what the published figure of two
    sockets implies. Two sockets share a host, whose sums are ours in shared memory, the best of them since a socket of
    theirs has nothing else to do; ranks on other hosts are sent the numbers one after the other.
    """
    bytes_per_weight = {"none": 2.0, "int8": 1.0, "int4": 0.5625, "int4-g128": 0.516}[quantization]
    read_bytes = bytes_per_weight * (block_weights(LLAMA_1_1B) + head_weights(LLAMA_1_1B))
    fraction = read_bytes / decode_s / (reads_gb_per_s * 1e9)
    weight_bytes = 2.0 * (block_weights(LLAMA_70B) + head_weights(LLAMA_70B))
    numbers = LLAMA_70B["hidden_size"]
    sum_count = 2 * LLAMA_70B["num_hidden_layers"]
    shared_s = min(sums[SHARED][4])  # 4 x 2048 numbers are one token of 8192

    def sum_s(sockets: int, link: Link | None) -> float:
        if link is None:
            return shared_s * sockets / 2  # every rank reads the numbers of all
        away = sockets - 2
        return shared_s + (link.one_way_s + away * 4 * numbers / link.bytes_per_s if away else 0.0)

    def tokens_ms(reading_s: float, link: Link | None) -> dict[str, float]:
        """`reading_s` is that of one socket alone."""
        two, eight = (1e3 * (reading_s / n + sum_count * sum_s(n, link)) for n in (2, 8))
        return {
            "2 sockets ms": round(two, 1),
            "8 sockets ms": round(eight, 1),
            "ratio": round(two / eight, 2),
        }

    ours_s = weight_bytes / (SOCKET_GB_PER_S * 1e9 * fraction)
    theirs_s = 2 * (PAPER_MS[2] / 1e3 - sum_count * sum_s(2, None))
    return {
        "published": {"2 sockets ms": PAPER_MS[2], "8 sockets ms": PAPER_MS[8], "ratio": 2.85},
        "inputs": {
            "weights": f"{weight_bytes / 1e9:.1f} GB of bfloat16",
            "memory of a socket": f"{SOCKET_GB_PER_S:.0f} GB/s (data sheet)",
            "part of it that our decoding reaches": round(fraction, 3),
            "part of it that two sockets' 249.7 ms imply": round(
                weight_bytes / theirs_s / SOCKET_GB_PER_S / 1e9, 3
            ),
            "one thread reads here": f"{reads_gb_per_s:.1f} GB/s (measured)",
            "sum of 8192 numbers over two ranks": f"{1e6 * shared_s:.1f} us (measured, best)",
            "sums in a token": sum_count,
        },
        "at our reading speed": {name: tokens_ms(ours_s, link) for name, link in LINKS.items()},
        "at theirs": {name: tokens_ms(theirs_s, link) for name, link in LINKS.items()},
        "a sum over 8 sockets, if theirs read 4 times as fast as 2": (
            f"{1e3 * (PAPER_MS[8] - PAPER_MS[2] / 4) / sum_count:.0f} us"
        ),
    }


def figures(sums: dict[str, dict[int, list[float]]], delayed: dict[float, list[float]]) -> list[Figure]:
    by_size = Figure(
        "sum over two ranks, float32 [tokens, 2048]", "tokens", "microseconds", log_x=True, log_y=True
    )
    for way, times in sums.items():
        by_size.add_line(way, list(times), [1e6 * statistics.median(each) for each in times.values()])
    by_delay = Figure("decoding over two processes", "latency of the link, ms", "ms a token")
    measured = [1e3 * statistics.median(times) for times in delayed.values()]
    by_delay.add_line("measured, median", [1e3 * delay_s for delay_s in delayed], measured)
    expected = [measured[0] + 1e3 * SUMS_PER_STEP * delay_s for delay_s in delayed]
    by_delay.add_line(f"{SUMS_PER_STEP} sums a token", [1e3 * delay_s for delay_s in delayed], expected)
    return [by_size, by_delay]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    main()
