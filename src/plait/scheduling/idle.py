"""When a running request that has nothing to compute gives its blocks to one that waits for blocks.

A fed request (`NewRequest.fed`) is idle for as long as others, elsewhere, work on its last piece. Its policy would let
it keep its blocks all that time, which is right while nobody else wants them, since it will be back. But requests that
cross several machines would so hold blocks here while they wait for blocks there, and two of them could wait for each
other for ever. Hence wound-wait (Rosenkrantz, Stearns and Lewis 1978, section 3): who is earlier in `order` takes the
blocks of who is later, never the other way round. Where all machines agree on the order, no circle of waiting can
close: the earliest goes on everywhere.

We differ in one thing: only the idle are wounded. Who has something to compute does so first, and is idle then.
"""

from plait.scheduling.plan import SchedulerView, StepPlan
from plait.scheduling.request import ScheduledRequest


def idle_victim(view: SchedulerView, plan: StepPlan) -> ScheduledRequest | None:
    """Who should give way so that the first of those waiting is admitted; None if nobody, or if that would not do.

    `plan` is what the policy decided on `view`. The caller preempts the victim and asks the policy again.
    """
    if plan.victims or plan.admissions or not view.waiting:
        return None
    if sum(grant.tokens for grant in plan.grants) >= view.limits.step_tokens:
        return None  # it is the step that is full
    first, pool = view.waiting[0], view.pool
    later = [request for request in view.running if request.order > first.order and request.idle]
    wanted_blocks = sum(pool.blocks_for(len(sequence.token_ids)) for sequence in first.live)
    if len(later) < len(view.running):
        wanted_blocks += int(view.limits.watermark_fraction * pool.kv_blocks)
    tables = [sequence.kv_blocks for request in later for sequence in request.live]
    freed_blocks = sum(pool.is_own(kv_block) for table in tables for kv_block in table)
    room_blocks = pool.free_blocks + pool.promised_blocks + freed_blocks
    return later[-1] if later and wanted_blocks <= room_blocks else None
