# pyright: standard
"""A creditor attends for its debtors while its own engine computes in another thread: neither changes a bit."""

from dataclasses import replace
from threading import Thread

import numpy as np
import pytest
import torch
from span_chain import TINY_BLOCKS, SpanChain, tiny_options

from plait.engine import load_span_engine
from plait.ids import PeerId
from plait.kernels import native_available
from plait.kvcache import Granted, LoanTerms
from plait.session import SamplingParams

DEBTOR = PeerId("debtor")
NATIVE = pytest.mark.skipif(not native_available, reason="plait's kernels are not built here")


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=NATIVE)])
def test_attention_for_others_beside_a_step_changes_no_bit(dtype: str) -> None:
    options = replace(tiny_options(dtype, 1, step_tokens=48), kv_cache_bytes=2**21)
    engine = load_span_engine(options, range(TINY_BLOCKS), loan_terms=LoanTerms(lendable_blocks=4))
    loans = engine.loans
    assert loans is not None
    chain = SpanChain([engine])
    prompt = np.random.default_rng(1).integers(5, 900, 40).tolist()
    greedy = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    alone = chain.run(chain.open(prompt, greedy)).answer

    content = loans.store.read_blocks([0])[0].clone()  # what that session left is some content of a block
    granted = loans.book.reserve(DEBTOR, 1, 3, 0.0)
    assert isinstance(granted, Granted)
    assert all(loans.write(DEBTOR, block, content) for block in granted.blocks)
    attention = engine.spec.blocks[0].attention
    query = torch.randn(1, attention.heads, attention.cached_dim, generator=torch.Generator().manual_seed(2))

    def attend(block: int) -> list[bytes]:
        part = loans.attend(DEBTOR, granted.blocks, (0, 16, 32), block, 100, query)
        return [each.contiguous().numpy().tobytes() for each in part]

    quiet = [attend(block) for block in range(TINY_BLOCKS)]
    answers: list[tuple[int, ...]] = []
    steps = Thread(target=lambda: answers.append(chain.run(chain.open(prompt, greedy)).answer))
    steps.start()
    rounds = 0
    while steps.is_alive() or rounds < 3:
        assert [attend(block) for block in range(TINY_BLOCKS)] == quiet
        rounds += 1
    steps.join()
    assert answers == [alone]
