"""Which tokens run in the next forward pass.

limits.py      how much a step may do, and what happens when blocks run out
request.py     a request as the scheduler sees it: its sequences, their tokens, their blocks
gang.py        how the sequences of one request share tokens, and the blocks they then need
plan.py        what a policy sees and what it may decide
reserved.py    policies `static` and `orca`: room for the longest possible answer is set aside at admission
paged.py       policy `paged`: blocks on demand, prompts in chunks, preemption
policies.py    the policies by name
idle.py        when a request that has nothing to compute gives way to one that waits
rounds.py      which sessions of a chain a hop waits for, so that they share steps
step.py        a decided step, as the runner executes it
scheduler.py   the owner of all this state: applies what the policy decides
usage.py       how much of the held memory is useful
"""

from plait.scheduling.limits import Preemption, StepLimits
from plait.scheduling.plan import (
    Admission,
    Grant,
    SchedulerView,
    SchedulingPolicy,
    StepPlan,
    Victim,
)
from plait.scheduling.policies import POLICY_NAMES, policy_named
from plait.scheduling.request import NewRequest, ScheduledRequest, ScheduledSequence
from plait.scheduling.rounds import SHARED_TOKENS, Round, gather_until_s
from plait.scheduling.scheduler import Scheduler
from plait.scheduling.step import ScheduledChunk, ScheduledStep
from plait.scheduling.usage import KvUsage, SchedulerCounts

__all__ = [
    "POLICY_NAMES",
    "SHARED_TOKENS",
    "Admission",
    "Grant",
    "KvUsage",
    "NewRequest",
    "Preemption",
    "Round",
    "ScheduledChunk",
    "ScheduledRequest",
    "ScheduledSequence",
    "ScheduledStep",
    "Scheduler",
    "SchedulerCounts",
    "SchedulerView",
    "SchedulingPolicy",
    "StepLimits",
    "StepPlan",
    "Victim",
    "gather_until_s",
    "policy_named",
]
