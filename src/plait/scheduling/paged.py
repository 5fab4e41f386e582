"""Policy `paged`: blocks on demand, prompts in chunks, preemption.

Each step, with everybody in `order` (priority class, then arrival):

1. Those running get tokens: first every decoding sequence its one (admission keeps the number of
   sequences within the budget, so all fit), then unfinished prompts share what is left, oldest first.
2. While these tokens need more blocks than are free, the last of those running is preempted and the rest
   is granted anew. The first alone always fits, since requests that exceed the pool are refused at
   submission. So the first always advances, and whoever waits becomes the first one day.
   Where blocks can move to other machines (`kvcache/debt_book.py`), those promised count as free here, grants wait
   until they are, and the first is never preempted: it waits for a loan.
3. If nobody was preempted, those waiting are admitted in order until one does not fit. Preempted requests
   are older than any newcomer of their class, hence come back before anyone new enters. Admission wants
   blocks for all known tokens of a request, those promised to unfinished prompts not counted as free, and
   leaves the watermark unless nothing else runs.

Within a class nobody overtakes; a class can starve those below it, which is what priority means here. Kwon et
al. 2023 (PagedAttention) section 4.5 for preemption of gangs, vLLM's V1 engine for the token budget.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from plait.scheduling.gang import blocks_to_finish, blocks_to_write, shared_prompt_tokens, split_tokens
from plait.scheduling.limits import StepLimits
from plait.scheduling.plan import Admission, Grant, KvBlocks, SchedulerView, StepPlan, Victim
from plait.scheduling.request import ScheduledRequest


class PagedPolicy:
    """The default; see the head of this file."""

    name = "paged"
    reserves = False

    def plan_step(self, view: SchedulerView) -> StepPlan:
        """Advance those running, preempt if blocks run out, else admit."""
        staying = view.running
        free_blocks = view.pool.free_blocks
        advance = _advance(staying, view.limits, view.pool)
        if advance.blocks > free_blocks:
            victims: list[Victim] = []
            dropped: Counter[int] = Counter()
            host_blocks = view.host_pool.free_blocks if view.host_pool else 0
            promised_blocks = view.pool.promised_blocks
            while advance.blocks > free_blocks + promised_blocks and len(staying) > 1:
                staying, request = staying[:-1], staying[-1]
                held = held_blocks(request)
                swap = _prefers_swap(request, view.limits, view.pool) and 0 < held <= host_blocks
                host_blocks -= held if swap else 0
                victims.append(Victim(request, swap))
                free_blocks += _freed_by(request, view.pool, dropped)
                advance = _advance(staying, view.limits, view.pool)
            return StepPlan(_fitting(advance.grants, free_blocks, view.pool), victims=victims)
        return StepPlan(advance.grants, admissions=_admit(view, advance))


@dataclass(slots=True)
class _Advance:
    """Grants so far in this step, the blocks they need, and what they leave.

    `promised_blocks` are those that unfinished prompts will need in later steps.
    """

    grants: list[Grant]
    blocks: int
    promised_blocks: int
    left_tokens: int


def _advance(running: Sequence[ScheduledRequest], limits: StepLimits, pool: KvBlocks) -> _Advance:
    block_tokens = pool.block_tokens
    grants: list[Grant] = []
    behind: list[ScheduledRequest] = []
    blocks = 0
    tokens = 0
    for request in running:
        sole = request.sole
        if sole is not None:
            computed = sole.computed_tokens
            pending = len(sole.token_ids) - computed
            if pending == 1:
                tokens += 1
                if not computed % block_tokens:
                    blocks += 1
                grants.append(Grant(request, 1))
            elif pending:
                behind.append(request)
        elif not request.stem_tokens and all(sequence.pending_tokens == 1 for sequence in request.live):
            tables, starts = _progress(request)
            tokens += len(starts)
            blocks += blocks_to_write(pool, tables, starts, [1] * len(starts))
            grants.append(Grant(request, len(starts)))
        else:
            behind.append(request)
    assert tokens <= limits.step_tokens, "admission keeps decoding sequences within the budget"
    advance = _Advance(grants, blocks, promised_blocks=0, left_tokens=limits.step_tokens - tokens)
    for request in behind:
        tables, starts = _progress(request)
        _grant_chunk(advance, request, tables, starts, request.stem_tokens, limits, pool)
        advance.promised_blocks += blocks_to_finish(pool, request, tables, starts, request.stem_tokens)
    return advance


def _fitting(grants: Sequence[Grant], free_blocks: int, pool: KvBlocks) -> list[Grant]:
    """What of the grants has room in blocks that are free now; the rest waits until full ones have moved out."""
    fitting: list[Grant] = []
    for request, tokens in grants:
        tables, starts = _progress(request)
        parts = split_tokens(request, starts, request.stem_tokens, tokens)
        blocks = blocks_to_write(pool, tables, starts, parts)
        if blocks > free_blocks and request.sole is not None:
            tokens = max(0, (len(tables[0]) + free_blocks) * pool.block_tokens - starts[0])
            blocks = blocks_to_write(pool, tables, starts, [tokens])
        if tokens and blocks <= free_blocks:
            fitting.append(Grant(request, tokens))
            free_blocks -= blocks
    return fitting


def _grant_chunk(
    advance: _Advance,
    request: ScheduledRequest,
    tables: Sequence[Sequence[int]],
    starts: Sequence[int],
    stem_tokens: int,
    limits: StepLimits,
    pool: KvBlocks,
    room_blocks: int | None = None,
) -> bool:
    """Grant what the budget leaves to a request that is behind, in at most `room_blocks` more blocks.

    Returns False if it can use nothing of that.
    """
    offer = advance.left_tokens
    if limits.long_prefill_tokens is not None:
        # A group samples together or not at all: a cap below its size would stop it for ever.
        offer = min(offer, max(limits.long_prefill_tokens, len(request.live)))
    if room_blocks is not None and request.sole is not None:
        offer = min(offer, (len(tables[0]) + room_blocks) * pool.block_tokens - starts[0])
    parts = split_tokens(request, starts, stem_tokens, offer)
    tokens = sum(parts)
    if not tokens:
        return False
    blocks = blocks_to_write(pool, tables, starts, parts)
    if room_blocks is not None and blocks > room_blocks:
        return False
    advance.grants.append(Grant(request, tokens))
    advance.left_tokens -= tokens
    advance.blocks += blocks
    advance.promised_blocks -= blocks
    return True


def _admit(view: SchedulerView, advance: _Advance) -> list[Admission]:
    pool, limits = view.pool, view.limits
    watermark_blocks = int(limits.watermark_fraction * pool.kv_blocks)
    sequences = view.running_sequences
    admissions: list[Admission] = []
    revived: set[int] = set()
    for request in view.waiting:
        sequences += request.fan_out
        free_blocks = pool.free_blocks - advance.blocks
        spare_blocks = free_blocks + pool.promised_blocks - advance.promised_blocks
        if sequences > limits.admissible_sequences or not advance.left_tokens or spare_blocks <= 0:
            break
        if request.swapped:
            assert view.host_pool is not None
            counted_in = view.host_pool
            admission = Admission(request, stem_tokens=request.stem_tokens)
            tables, starts = _progress(request)
            entry_blocks = held_blocks(request)
        else:
            counted_in = pool
            admission = _with_prefixes(request, pool)
            tables = admission.prefixes
            starts = [len(table) * pool.block_tokens for table in tables]
            fresh = {block for table in tables for block in table if not pool.references(block)} - revived
            entry_blocks = len(fresh)
            revived |= fresh
        needed = entry_blocks + blocks_to_finish(counted_in, request, tables, starts, admission.stem_tokens)
        if view.running or admissions:
            needed += watermark_blocks
        if needed > spare_blocks:
            break
        room_blocks = free_blocks - entry_blocks if pool.promised_blocks else None
        if not _grant_chunk(
            advance, request, tables, starts, admission.stem_tokens, limits, counted_in, room_blocks
        ):
            break
        advance.blocks += entry_blocks
        advance.promised_blocks += blocks_to_finish(
            counted_in, request, tables, starts, admission.stem_tokens
        )
        admissions.append(admission)
    return admissions


def _with_prefixes(request: ScheduledRequest, pool: KvBlocks) -> Admission:
    """The longest cached prefix of each live sequence, short of its last token, which must be computed."""
    if not request.reuse_prefix:
        prefixes: list[list[int]] = [[] for _ in request.live]
    else:
        prefixes = []
        for sequence in request.live:
            full_blocks = (len(sequence.token_ids) - 1) // pool.block_tokens
            prefixes.append(pool.match(sequence.block_keys(full_blocks, pool.block_tokens)))
    stem_tokens = shared_prompt_tokens(request.prompt_tokens, pool.block_tokens)
    if len(prefixes) == 1 or len(prefixes[0]) * pool.block_tokens >= stem_tokens:
        return Admission(request, prefixes=prefixes)
    return Admission(request, prefixes=[prefixes[0]] + [[] for _ in prefixes[1:]], stem_tokens=stem_tokens)


def _progress(request: ScheduledRequest) -> tuple[list[list[int]], list[int]]:
    """Block tables and computed tokens of the live sequences."""
    tables = [sequence.kv_blocks for sequence in request.live]
    starts = [sequence.computed_tokens for sequence in request.live]
    return tables, starts


def held_blocks(request: ScheduledRequest) -> int:
    """Different blocks in the tables of a request."""
    return len({block for sequence in request.live for block in sequence.kv_blocks})


def _freed_by(request: ScheduledRequest, pool: KvBlocks, dropped: Counter[int]) -> int:
    """Blocks that become free when a request leaves, after those whose references are in `dropped`."""
    freed = 0
    for sequence in request.live:
        for block in sequence.kv_blocks:
            dropped[block] += 1
            freed += dropped[block] == pool.references(block) and pool.is_own(block)
    return freed


def _prefers_swap(request: ScheduledRequest, limits: StepLimits, pool: KvBlocks) -> bool:
    if not all(pool.is_own(block) for sequence in request.live for block in sequence.kv_blocks):
        return False  # what is on other machines cannot be copied to this one's host memory
    return limits.preemption == "swap" or (limits.preemption == "auto" and len(request.live) > 1)
