"""Which peer serves which blocks, and how many machines are best.

balance.py    PETALS' rules: the span that a joining peer takes, and when a serving one moves
capacity.py   how many blocks fit a machine
advice.py     when fewer machines are faster, and why a machine got so many blocks
"""

from plait.placement.advice import Advice, Machines, advise, explain_span
from plait.placement.balance import BALANCE_QUALITY, better_span, block_throughputs, choose_span
from plait.placement.capacity import BlockCost, explain_fit, fitting_blocks

__all__ = [
    "BALANCE_QUALITY",
    "Advice",
    "BlockCost",
    "Machines",
    "advise",
    "better_span",
    "block_throughputs",
    "choose_span",
    "explain_fit",
    "explain_span",
    "fitting_blocks",
]
