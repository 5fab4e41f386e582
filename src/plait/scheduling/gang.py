"""How the sequences of one request share tokens, and the blocks they then need.

The sequences of a request sample in the same step or not at all. So tokens granted to a group first bring
all of its sequences to where only their last token is missing, and the last tokens are computed together.

A preempted group that recomputes must not need more memory than it had. Its sequences shared at least the
full blocks of the prompt, so its first sequence computes these (the stem), then all share them again.
"""

from collections import Counter
from collections.abc import Sequence

from plait.scheduling.plan import KvBlocks
from plait.scheduling.request import NewRequest, ScheduledRequest


def split_tokens(
    request: ScheduledRequest, starts: Sequence[int], stem_tokens: int, tokens: int
) -> list[int]:
    """How many of at most `tokens` each live sequence computes, if they continue from `starts`."""
    if stem_tokens:
        return [min(tokens, stem_tokens - starts[0])] + [0] * (len(starts) - 1)
    pending = [len(sequence.token_ids) - start for sequence, start in zip(request.live, starts, strict=True)]
    if all(pending) and sum(pending) <= tokens:
        return pending
    parts: list[int] = []
    for behind in pending:
        part = min(max(behind - 1, 0), tokens)
        tokens -= part
        parts.append(part)
    return parts


def blocks_to_write(
    pool: KvBlocks, tables: Sequence[Sequence[int]], starts: Sequence[int], parts: Sequence[int]
) -> int:
    """Blocks that must be free for each sequence to write its part: growth and copies on write.

    A partly filled last block that several sequences share is copied by each writer but the last one left.
    """
    needed = 0
    left_by: Counter[int] = Counter()
    for table, start, part in zip(tables, starts, parts, strict=True):
        if not part:
            continue
        needed += max(pool.blocks_for(start + part) - len(table), 0)
        if start % pool.block_tokens:
            last = table[-1]
            if pool.references(last) - left_by[last] > 1:
                left_by[last] += 1
                needed += 1
    return needed


def blocks_to_finish(
    pool: KvBlocks,
    request: ScheduledRequest,
    tables: Sequence[Sequence[int]],
    starts: Sequence[int],
    stem_tokens: int,
) -> int:
    """Blocks that must be free for all known tokens of a request to be computed."""
    pending = [len(sequence.token_ids) - start for sequence, start in zip(request.live, starts, strict=True)]
    needed = blocks_to_write(pool, tables, starts, pending)
    return needed - stem_tokens // pool.block_tokens * (len(pending) - 1)


def shared_prompt_tokens(prompt_tokens: int, block_tokens: int) -> int:
    """Tokens in full blocks of a prompt that all sequences share for sure: all but the last token's block."""
    return (prompt_tokens - 1) // block_tokens * block_tokens


def worst_case_blocks(request: NewRequest, block_tokens: int, *, sharing: bool) -> int:
    """Blocks that a request holds when all its sequences have their maximum length."""
    of_one = -(-request.max_sequence_tokens // block_tokens)
    shared = shared_prompt_tokens(len(request.token_ids), block_tokens) // block_tokens if sharing else 0
    return shared + request.fan_out * (of_one - shared)
