"""plait: an LLM server woven from unequal machines.

`LLM` and `SamplingParams` serve offline use; `plait serve` starts the server.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plait.session import Constraint, SamplingParams
    from plait.worker import LLM

# Before torch loads its OpenMP, which reads this once: threads that spin while they wait for each other lose a
# whole time slice whenever another program takes one of their cores (measured: 150 instead of 1,900 tokens/s beside
# one busy process). Sleeping costs a few microseconds a barrier. Set the variable to ACTIVE on a machine of one's own.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
__all__ = ["LLM", "Constraint", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    # torch takes seconds to import, numpy a part of one: only those pay for it who touch what needs it.
    if name == "LLM":
        from plait.worker import LLM

        return LLM
    if name in ("Constraint", "SamplingParams"):
        import plait.session

        return getattr(plait.session, name)
    raise AttributeError(f"module 'plait' has no attribute {name!r}")
