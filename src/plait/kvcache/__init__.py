"""Bookkeeping of KV blocks: which hold what, who shares them, what may be overwritten, what is lent and borrowed.

pool.py           reference-counted blocks, those free but still cached, copy-free sharing; numbers of borrowed ones
prefix.py         stable names for the content of full blocks, and the index from name to block
loan_book.py      a creditor's loans: leases, generations, recall
debt_book.py      a debtor's borrowed blocks: where each of them is
loan_hunt.py      a debtor's search for a creditor
debt_ledger.py    all debts of the swarm, rebuilt from heartbeats; whom to ask for memory
debt_cycles.py    debts that run in a circle, and what can go home
lending_plan.py   which moves serve more: a throughput model and a greedy plan
block_loans.py    both books of one pool, and what they do to its scheduler
lending_agent.py  one instance among those that lend to each other: events in, actions out
lending_debtor.py its debtor's half: hunts, moves out and home, recalls
loan_manager.py   its manager's half, for the one that keeps the ledger
lending_actions.py  how an instance lends, and what it wants done
"""

from plait.kvcache.block_loans import BegunMove, BlockLoans, LendingFacts, LoanScheduler, PlacedRequest
from plait.kvcache.debt_book import DebtBook, RemoteBlock
from plait.kvcache.debt_cycles import CycleSettlement, TakeHome, plan_take_home, settle_cycles
from plait.kvcache.debt_ledger import DebtHeartbeat, DebtLedger, DebtRow, Disagreement, PlacementChange
from plait.kvcache.lending_actions import (
    LendingAction,
    LendingCounts,
    LendingOptions,
    LendingPolicy,
    LoansChanged,
    Send,
    SendContent,
    WriteContent,
)
from plait.kvcache.lending_agent import LendingAgent
from plait.kvcache.lending_debtor import blocks_of, wire_blocks
from plait.kvcache.lending_plan import (
    InstanceLoad,
    LayerTimes,
    LendingRules,
    MovableRequest,
    PlannedMove,
    StepSample,
    after_move,
    best_move,
    fit_layer_times,
    plan_lending,
)
from plait.kvcache.loan_book import Granted, LentBlock, LoanBook, LoanTerms, NotGranted, Recall
from plait.kvcache.loan_hunt import (
    AskCreditor,
    AskManager,
    Candidates,
    HuntAction,
    HuntEvent,
    LoanGranted,
    LoanHunt,
    LoanRefused,
    PeerGone,
    TimePassed,
    Wanted,
    on_hunt_event,
)
from plait.kvcache.pool import KvBlockPool
from plait.kvcache.prefix import PrefixIndex, PrefixNamespace, chain_keys

__all__ = [
    "AskCreditor",
    "AskManager",
    "BegunMove",
    "BlockLoans",
    "Candidates",
    "CycleSettlement",
    "DebtBook",
    "DebtHeartbeat",
    "DebtLedger",
    "DebtRow",
    "Disagreement",
    "Granted",
    "HuntAction",
    "HuntEvent",
    "InstanceLoad",
    "KvBlockPool",
    "LayerTimes",
    "LendingAction",
    "LendingAgent",
    "LendingCounts",
    "LendingFacts",
    "LendingOptions",
    "LendingPolicy",
    "LendingRules",
    "LentBlock",
    "LoanBook",
    "LoanGranted",
    "LoanHunt",
    "LoanRefused",
    "LoanScheduler",
    "LoanTerms",
    "LoansChanged",
    "MovableRequest",
    "NotGranted",
    "PeerGone",
    "PlacedRequest",
    "PlacementChange",
    "PlannedMove",
    "PrefixIndex",
    "PrefixNamespace",
    "Recall",
    "RemoteBlock",
    "Send",
    "SendContent",
    "StepSample",
    "TakeHome",
    "TimePassed",
    "Wanted",
    "WriteContent",
    "after_move",
    "best_move",
    "blocks_of",
    "chain_keys",
    "fit_layer_times",
    "on_hunt_event",
    "plan_lending",
    "plan_take_home",
    "settle_cycles",
    "wire_blocks",
]
