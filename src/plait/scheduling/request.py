"""A request as the scheduler sees it: its sequences, their tokens, their blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

from plait.ids import RequestId
from plait.kvcache import chain_keys


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRequest:
    """A prompt to be scheduled.

    `max_sequence_tokens` bounds prompt and answer of one sequence together; `fan_out` is the most
    sequences that will run side by side (samples, beams). A lower `priority` goes first. Prefixes are
    shared only within one `namespace` (`PrefixNamespace.root_key`); `reuse_prefix=False` computes every
    token of the prompt even so.

    The tokens of a `fed` request all come from outside, piece by piece (`Scheduler.extend`), and it may begin with
    none. Its blocks are its own: no prefix of it is looked up or can be found by others.
    """

    id: RequestId
    token_ids: Sequence[int]
    max_sequence_tokens: int
    fan_out: int = 1
    priority: int = 0
    namespace: bytes = b""
    reuse_prefix: bool = True
    fed: bool = False


class ScheduledSequence:
    """One sequence: `token_ids` known so far, of which the first `computed_tokens` are in the cache.

    `kv_blocks` is its block table: of the device pool while its request runs, of the host pool while that is
    swapped out, empty while it waits. Between steps it covers the computed tokens and not a block more.
    Only its last block may be partly filled. The blocks of a `private` one are never named for others to find.
    `seen_tokens` is how many of its tokens were ever computed: preemption does not take that back.
    """

    __slots__ = (
        "_block_keys",
        "_root_key",
        "computed_tokens",
        "finished",
        "index",
        "kv_blocks",
        "private",
        "published_blocks",
        "seen_tokens",
        "token_ids",
    )

    def __init__(self, index: int, token_ids: list[int], root_key: bytes, *, private: bool = False) -> None:
        self.index = index
        self.token_ids = token_ids
        self.private = private
        self.computed_tokens = 0
        self.seen_tokens = 0
        self.kv_blocks: list[int] = []
        self.published_blocks = 0
        self.finished = False
        self._root_key = root_key
        self._block_keys: list[bytes] = []

    @property
    def pending_tokens(self) -> int:
        """Tokens known but not yet computed; 1 while decoding."""
        return len(self.token_ids) - self.computed_tokens

    def block_keys(self, blocks: int, block_tokens: int) -> list[bytes]:
        """Names of its first `blocks` full blocks."""
        if len(self._block_keys) < blocks:
            chain_keys(self._block_keys, self._root_key, self.token_ids, blocks, block_tokens)
        return self._block_keys[:blocks]

    def fork(self, index: int) -> "ScheduledSequence":
        """A sequence of the same tokens; its block table is the caller's to set."""
        child = ScheduledSequence(index, list(self.token_ids), self._root_key)
        child.computed_tokens = self.computed_tokens
        child.seen_tokens = self.seen_tokens
        child.published_blocks = self.published_blocks
        child._block_keys = list(self._block_keys)
        return child


class ScheduledRequest:
    """A request and its sequences, which step, wait, leave and come back together (a gang).

    `order` decides who goes first and, from the other end, who is preempted: priority class, then
    arrival. `stem_tokens` is above 0 while a preempted group rebuilds: its first sequence recomputes the
    full blocks of the prompt, which the others then share again, as they did before. `reserve` are blocks
    set aside at admission and not yet in a table. `resting`: it is fed, has nothing new, and is in no queue.
    """

    __slots__ = (
        "cached_tokens",
        "fan_out",
        "fed",
        "id",
        "live",
        "max_sequence_tokens",
        "order",
        "prompt_tokens",
        "reserve",
        "resting",
        "reuse_prefix",
        "running",
        "sequences",
        "sole",
        "started",
        "stem_tokens",
        "swapped",
    )

    def __init__(self, new: NewRequest, arrival: int) -> None:
        self.id = new.id
        self.order = (new.priority, arrival)
        self.prompt_tokens = len(new.token_ids)
        self.max_sequence_tokens = new.max_sequence_tokens
        self.fan_out = new.fan_out
        self.fed = new.fed
        self.reuse_prefix = new.reuse_prefix and not new.fed
        self.running = False
        self.resting = False
        self.swapped = False
        self.started = False
        self.stem_tokens = 0
        self.cached_tokens = 0
        self.reserve: list[int] = []
        self.sequences: list[ScheduledSequence] = []
        self.live: list[ScheduledSequence] = []
        self.sole: ScheduledSequence | None = None
        self.set_sequences([ScheduledSequence(0, list(new.token_ids), new.namespace, private=new.fed)])

    @property
    def idle(self) -> bool:
        """Whether all that is known of it is computed, as of a fed request that waits for more."""
        return self.sole is not None and not self.sole.pending_tokens

    @property
    def has_news(self) -> bool:
        """Whether something is known of it that never was computed."""
        return any(len(sequence.token_ids) > sequence.seen_tokens for sequence in self.live)

    def set_sequences(self, sequences: list[ScheduledSequence]) -> None:
        """Replace the sequences; `live` are those not finished, `sole` is the only live one, if so."""
        self.sequences = sequences
        self.live = [sequence for sequence in sequences if not sequence.finished]
        self.sole = self.live[0] if len(self.live) == 1 else None
        if self.sole is not None:
            self.stem_tokens = 0
