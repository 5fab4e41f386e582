"""Policies that set room aside for the longest possible answer when they admit a request.

Whoever was admitted can always finish: no preemption, no deadlock, at the price of memory that mostly
stays empty. Prompts run whole, in one step. The token budget of a step bounds how many prompts start in
it, but one may always start, as long as it may be.
"""

from collections.abc import Iterable

from plait.scheduling.limits import StepLimits
from plait.scheduling.plan import Admission, Grant, SchedulerView, StepPlan
from plait.scheduling.request import ScheduledRequest


class StaticPolicy:
    """Request-level batching, the baseline: a batch is formed when nothing runs, and nobody joins until
    all of it has ended.

    The prompts of a batch may take several steps, within the token budget. Kinder than the servers that
    Yu et al. 2022 (ORCA) compare with: a finished request is answered at once and its place in the batch
    costs no more computation, and there is no padding.
    """

    name = "static"
    reserves = True

    def plan_step(self, view: SchedulerView) -> StepPlan:
        """Advance the batch, or form the next one."""
        if view.running:
            return StepPlan(_grant_whole(view.running, view.limits))
        admissions: list[Admission] = []
        free_blocks = view.pool.free_blocks
        sequences = 0
        for request in view.waiting:
            blocks = reserved_blocks(request, view)
            sequences += request.fan_out
            if blocks > free_blocks or sequences > view.limits.admissible_sequences:
                break
            free_blocks -= blocks
            admissions.append(Admission(request, reserved_blocks=blocks))
        grants = _grant_whole((admission.request for admission in admissions), view.limits)
        return StepPlan(grants, admissions=admissions)


class OrcaPolicy:
    """Iteration-level scheduling: requests join and leave between any two steps.

    Strictly first come, first served: if the next request does not fit, nobody overtakes it. Yu et al. 2022
    (ORCA), algorithm 1; `max_bs` counts sequences here, and the token budget is our addition.
    """

    name = "orca"
    reserves = True

    def plan_step(self, view: SchedulerView) -> StepPlan:
        """Advance everyone, then admit from the head of the queue."""
        grants = _grant_whole(view.running, view.limits)
        tokens = sum(grant.tokens for grant in grants)
        admissions: list[Admission] = []
        free_blocks = view.pool.free_blocks
        sequences = view.running_sequences
        for request in view.waiting:
            blocks = reserved_blocks(request, view)
            sequences += request.fan_out
            tokens += request.prompt_tokens
            if blocks > free_blocks or sequences > view.limits.admissible_sequences:
                break
            if admissions and tokens > view.limits.step_tokens:
                break
            free_blocks -= blocks
            admissions.append(Admission(request, reserved_blocks=blocks))
            grants.append(Grant(request, request.prompt_tokens))
        return StepPlan(grants, admissions=admissions)


def reserved_blocks(request: ScheduledRequest, view: SchedulerView) -> int:
    """Blocks for every sequence of a request at its maximum length, nothing shared."""
    return view.pool.blocks_for(request.max_sequence_tokens) * request.fan_out


def _grant_whole(requests: Iterable[ScheduledRequest], limits: StepLimits) -> list[Grant]:
    """Every decoding request, then whole prompts in order while the budget lasts."""
    grants: list[Grant] = []
    prompts: list[ScheduledRequest] = []
    tokens = 0
    for request in requests:
        sole = request.sole
        if sole is None:
            if all(sequence.pending_tokens for sequence in request.live):
                grants.append(Grant(request, len(request.live)))
                tokens += len(request.live)
        else:
            pending = len(sole.token_ids) - sole.computed_tokens
            if pending == 1:
                grants.append(Grant(request, 1))
                tokens += 1
            elif pending > 1:
                prompts.append(request)
    first = len(grants)
    for request in prompts:
        tokens += request.prompt_tokens
        if tokens > limits.step_tokens and len(grants) > first:
            break
        grants.append(Grant(request, request.prompt_tokens))
    return grants
