"""How many blocks fit a machine."""

from dataclasses import dataclass

from plait.errors import BadSetup
from plait.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCost:
    """What a block of a model takes: its weights as they are kept, and the keys and values of one token."""

    weight_bytes: int
    kv_bytes_per_token: int

    def __post_init__(self) -> None:
        if self.weight_bytes <= 0 or self.kv_bytes_per_token < 0:
            raise BadSetup(
                f"a block cannot take {self.weight_bytes} bytes and {self.kv_bytes_per_token} a token"
            )

    def block_bytes(self, context_tokens: int) -> int:
        """A block with cache for so many tokens, over all sessions."""
        return self.weight_bytes + context_tokens * self.kv_bytes_per_token


def fitting_blocks(memory_bytes: int, cost: BlockCost, *, context_tokens: int, reserve_bytes: int = 0) -> int:
    """How many blocks, each with cache for `context_tokens`, fit beside `reserve_bytes` for everything else.

    PETALS' rule, with the model's own sizes in place of its constants.
    """
    return max(0, memory_bytes - reserve_bytes) // cost.block_bytes(context_tokens)


def explain_fit(memory_bytes: int, cost: BlockCost, *, context_tokens: int, reserve_bytes: int = 0) -> str:
    """The same as a sentence."""
    blocks = fitting_blocks(memory_bytes, cost, context_tokens=context_tokens, reserve_bytes=reserve_bytes)
    each = cost.block_bytes(context_tokens)
    beside = f", beside {format_bytes(reserve_bytes)} for the rest" if reserve_bytes else ""
    return (
        f"{format_bytes(memory_bytes)} hold {blocks} block{'s' if blocks != 1 else ''} of {format_bytes(each)} "
        f"each: {format_bytes(cost.weight_bytes)} of weights and {format_bytes(each - cost.weight_bytes)} of cache "
        f"for {context_tokens:,} tokens{beside}"
    )
