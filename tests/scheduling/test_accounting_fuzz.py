"""A hundred thousand random operations under memory pressure, and not a block lost."""

import random

import pytest
from simulated_engine import SimulatedEngine

from plait.errors import BadRequest, NoCapacity

OPERATIONS = 100_000


@pytest.mark.slow
@pytest.mark.parametrize("preemption", ["recompute", "swap", "auto"])
def test_random_appends_forks_ends_and_preemptions_lose_no_block(preemption: str) -> None:
    """The acceptance check of the paged memory; every step is checked as in the other tests."""
    rng = random.Random(preemption)
    engine = SimulatedEngine(
        kv_blocks=48,
        host_blocks=24,
        preemption=preemption,
        step_tokens=24,
        max_running_sequences=16,
        max_waiting=16,
    )
    operations = 0
    while operations < OPERATIONS:
        if rng.random() < 0.5:
            prompt = [rng.randrange(2) for _ in range(rng.randint(1, 30))]
            new_tokens, fan_out = rng.randint(1, 20), rng.choice([1, 1, 2, 4])
            try:
                engine.submit(prompt, new_tokens=new_tokens, fan_out=fan_out, reuse_prefix=rng.random() < 0.8)
            except (BadRequest, NoCapacity):
                continue
            operations += 1
        if rng.random() < 0.03 and engine.requests:
            engine.cancel(rng.choice(sorted(engine.requests)))
            operations += 1
        step = engine.begin_step()
        operations += len(step.preempted)
        due: dict[str, list[int]] = {}
        for request_id, sequence in engine.end_step(step):
            due.setdefault(request_id, []).append(sequence)
        for request_id, sequences in due.items():
            request = engine.requests[request_id]
            if request.fan_out > 1 and (not request.forked or rng.random() < 0.5):
                engine.fork(request_id, tuple(rng.choice(sequences) for _ in range(request.fan_out)))
                operations += 1
            for sequence in list(request.token_ids):
                engine.append(request_id, sequence, rng.randrange(2))
                operations += 1
            if request.forked and rng.random() < 0.05:
                engine.finish_sequence(request_id, rng.choice(list(request.token_ids)))
            if request_id in engine.requests:
                engine.end_the_long(request_id)
    engine.run_until_idle()
    assert engine.scheduler.counts().preemptions_total > 100
