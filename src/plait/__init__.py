"""plait: an LLM server woven from unequal machines.

`LLM` and `SamplingParams` serve offline use; `plait serve` starts the server.
"""

from typing import TYPE_CHECKING

from plait.session import Constraint, SamplingParams

if TYPE_CHECKING:
    from plait.worker import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "Constraint", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    # torch takes seconds to import: only those who touch LLM pay for it.
    if name == "LLM":
        from plait.worker import LLM

        return LLM
    raise AttributeError(f"module 'plait' has no attribute {name!r}")
