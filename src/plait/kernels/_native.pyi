"""Written by tools/write_native_types.py. An Array's type and shape are in the C++ that checks them, csrc/bind_*.cc."""

# ruff: noqa: E501

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy
from numpy.typing import NDArray
from torch import Tensor

Array: TypeAlias = NDArray[Any] | Tensor

def isa_names() -> list[str]:
    """
    Instruction sets that were compiled in and run on this machine, best first.
    """

def current_isa() -> str:
    """
    The one in use. ValueError if PLAIT_ISA asks for one that is not available.
    """

class QuantizedRows:
    """
    Rows of activations as a weight format wants them; see ActivationRows in csrc/table.h.
    """

    def __init__(self, values: Array, format: int, isa: str = "") -> None:
        """From float32 [rows, inputs]."""

    @property
    def codes(self) -> NDArray[numpy.uint8]:
        """The bytes of each row, padding included: uint8 [rows, bytes]."""

    @property
    def scales(self) -> NDArray[numpy.float32]:
        """float32 [rows, groups]; one group for int8, none for bf16."""

    @property
    def eight_sums(self) -> NDArray[numpy.int32]:
        """Eight times the sum of each int4 group's codes, int32."""

    @property
    def finite(self) -> NDArray[numpy.bool_]:
        """Whether all values of the row were: bool [rows, 1]."""

def linear(
    memory: Array,
    offset: int,
    columns: int,
    rows: QuantizedRows,
    out: Array,
    epilogue: str = "store",
    activation: str = "silu",
    bias: Array | None = None,
    scale: float = 1.0,
    swiglu_alpha: float = 0.0,
    swiglu_limit: float = 0.0,
    input_rows: Array | None = None,
    unit_rows: int = 0,
    pool: Pool | None = None,
    isa: str = "",
) -> None:
    """
    The matrix of `columns` outputs packed at byte `offset` of `memory`, times rows of its format, into `out`, float32. Output row r is made from input row input_rows[r], or r. A unit of work has `unit_rows` rows, or all.
    """

def read_stream(memory: Array, pool: Pool | None = None, isa: str = "") -> int:
    """
    Read all whole mebibytes of memory, from front to back; returns how many bytes that were.
    """

def repeat_dot(format: int, dots: int, pool: Pool | None = None, isa: str = "") -> int:
    """
    Multiply registers as a format's products do, `dots` times a thread; returns how many operations that is.
    """

def packed_bytes(format: int, columns: int, depth: int) -> int:
    """Memory of a packed matrix."""

def pack_into(
    out: Array,
    offset: int,
    source: Array,
    rows: Array,
    depth_begin: int,
    depth: int,
    format: int,
    threads: int,
    isa: str = "",
) -> None:
    """
    Pack inputs depth_begin .. depth_begin + depth of `source` [n, k], bfloat16 or float32, at byte `offset` of `out`; packed column c is row rows[c], zero if that is -1. The panels are shared among the threads.
    """

def unpack_from(
    memory: Array, offset: int, columns: int, depth: int, format: int, isa: str = ""
) -> NDArray[numpy.float32]:
    """What a packed matrix means, float32 [columns, depth]."""

def attention_rows(
    isa: str,
    format: str,
    heads: int,
    kv_heads: int,
    dim: int,
    keys: int,
    l2_bytes: int,
    window_tokens: int = 0,
    chunk_tokens: int = 0,
) -> int:
    """
    How many query rows of a sequence with this many keys are attended in one unit of work.
    """

def attention_scratch_bytes(
    isa: str, format: str, heads: int, kv_heads: int, dim: int, most_keys: int
) -> int:
    """
    Scratch memory that a thread needs for attention over up to this many keys.
    """

class AttentionRun:
    """What one call of KvPages.attend did."""

    @property
    def out(self) -> object:
        """float32 [rows, heads, dim]"""

    @property
    def scored(self) -> int:
        """Tiles of 16 keys times query rows and heads, multiplied with keys."""

    @property
    def weighed(self) -> int:
        """The same, multiplied with values."""

    @property
    def units(self) -> int:
        """Units of work."""

    @property
    def touched_bytes(self) -> int:
        """Scratch memory that a thread wrote, if watched."""

class KvPages:
    """
    Paged keys and values in memory of their own, in 'bf16' or 'int8', and threads that attend over them. For tests and measurements of the kernels.
    """

    def __init__(
        self,
        format: str,
        layers: int,
        kv_heads: int,
        dim: int,
        block_tokens: int,
        kv_blocks: int,
        threads: int = 1,
    ) -> None: ...
    @property
    def bytes(self) -> NDArray[numpy.uint8]:
        """The memory itself, uint8 [kv_blocks, extent bytes]."""

    @property
    def threads(self) -> int: ...
    def append(self, isa: str, layer: int, table: Array, start: int, keys: Array, values: Array) -> None:
        """
        Store keys and values float32 [tokens, kv_heads, dim] of the tokens from position `start` of the sequence whose KV blocks are `table`.
        """

    def attend(
        self,
        isa: str,
        layer: int,
        queries: Array,
        parts: Array,
        tables: Sequence[Array],
        *,
        scale: float,
        window_tokens: int = 0,
        chunk_tokens: int = 0,
        softcap: float = 0.0,
        sinks: Array | None = None,
        slopes: Array | None = None,
        way: str = "whole",
        unit_rows: int = 0,
        l2_bytes: int = 1048576,
        watches_scratch: bool = False,
    ) -> AttentionRun:
        """
        Attention of queries float32 [rows, heads, dim]. `parts` int64 [sequences, 3] are (first row, position of that row, rows), `tables` their KV blocks. `way`: 'whole' rows against all their keys, 'split' along the keys (one row a part), or 'two-dimensional' for comparison. `unit_rows` query rows make one unit of work, 0: as many as attention_rows says.
        """

def exp(values: Array) -> NDArray[numpy.float32]:
    """e^x of float32 numbers as the kernels have it."""

def sigmoid(values: Array) -> NDArray[numpy.float32]:
    """1 / (1 + e^-x) of float32 numbers as the kernels have it."""

def tanh(values: Array) -> NDArray[numpy.float32]:
    """tanh(x) of float32 numbers as the kernels have it."""

def erf(values: Array) -> NDArray[numpy.float32]:
    """The error function of float32 numbers as the kernels have it."""

def norm_row(
    row: Array, kind: str, eps: float, weight: Array | None = None, bias: Array | None = None, isa: str = ""
) -> NDArray[numpy.float32]:
    """The RMS ('rms') or layer ('layer') norm of a float32 row."""

def rotate(row: Array, heads: int, dim: int, cosines: Array, sines: Array, isa: str = "") -> None:
    """
    Turn the pairs (j, j + len(cosines)) of each head of a float32 row [heads * dim], in place.
    """

def scale_row(row: Array, factor: float, isa: str = "") -> None:
    """row *= factor"""

def add_row(out: Array, row: Array, factor: float, isa: str = "") -> None:
    """out += row * factor"""

def softcap_row(row: Array, cap: float, isa: str = "") -> None:
    """row = tanh(row / cap) * cap"""

def row_max(row: Array, isa: str = "") -> float:
    """The largest number of a float32 row; minus infinity if it is empty."""

def small_linear(weights: Array, bias: Array | None, row: Array, isa: str = "") -> NDArray[numpy.float32]:
    """weights [columns, depth] @ row [depth] + bias [columns], float32."""

def route_row(
    logits: Array,
    chosen: int,
    sigmoid: bool = False,
    renormalises: bool = False,
    scale: float = 1.0,
    groups: int = 1,
    kept_groups: int = 1,
    best_two: bool = False,
    correction: Array | None = None,
    isa: str = "",
) -> tuple[NDArray[numpy.int32], NDArray[numpy.float32]]:
    """
    One token's experts (int32) and their weights (float32) from router logits, as plait.engine.moe.route.
    """

def fold_top(
    values: Array, first_id: int, best_values: Array, best_ids: Array, filled: int, isa: str = ""
) -> int:
    """
    Fold values with ids first_id .. into the best so far, which are `filled`; return how many they are now.
    """

class Pool:
    """Threads that wait for a forward pass; see csrc/pool.h."""

    def __init__(self, threads: int, cores: Sequence[int] = []) -> None:
        """
        `threads` counts the one that runs a pass. `cores`: where each is pinned; the first, of that one, is not used.
        """

    @property
    def threads(self) -> int: ...
    def run(self, task: Callable[..., Any]) -> None:
        """
        task(thread) on every thread; returns when all have. Raises what the first that failed raised; RuntimeError in a forked child and during another run.
        """

    def barrier(self) -> None:
        """
        Inside a run: wait until all threads have called it. RuntimeError if another has failed.
        """

def exercise_pool(pool: Pool, runs: int, barriers: int) -> int:
    """
    Runs with barriers; returns how often a thread passed one before another had arrived.
    """

class Arena:
    """
    Zeroed memory, of huge pages where the system has them. MemoryError if it is short.
    """

    def __init__(self, bytes: int) -> None: ...
    @property
    def bytes(self) -> int: ...
    @property
    def memory(self) -> NDArray[numpy.uint8]:
        """All of it as uint8 [bytes]; the array keeps the arena."""

class Decoder:
    """A span of blocks on the CPU; see csrc/decoder.h."""

    def __init__(
        self,
        pool: Pool,
        weights: object,
        model: dict[str, Any],
        kv_format: str,
        kv_heads: int,
        dim: int,
        block_tokens: int,
        collective: Collective | None,
        l2_bytes: int,
        by_parts: bool,
    ) -> None: ...
    def add_rope_table(self) -> int: ...
    def set_rope_table(self, index: int, rope: int, cosines: object, sines: object) -> None: ...
    def forward(self, step: dict[str, Any]) -> None: ...
    def start(self, step: dict[str, Any]) -> None: ...
    def advance(self, elsewhere: list[Any]) -> None: ...
    def attend(self) -> None: ...
    def queries(self, share: int, out: Array) -> None: ...
    def non_finite(self) -> str: ...
    def seconds(self) -> dict[str, float]: ...

def kv_extent_bytes(format: str, layers: int, heads: int, dim: int, block_tokens: int) -> int: ...

class Lender:
    """
    Attention over KV blocks of others, of a span whose blocks have these shapes.
    """

    def __init__(
        self,
        pool: Pool,
        blocks: list[Any],
        kv_format: str,
        kv_heads: int,
        dim: int,
        block_tokens: int,
        l2_bytes: int,
        isa: str = "",
    ) -> None: ...
    def attend(
        self,
        kv: Array,
        layer: int,
        kv_blocks: Array,
        starts: Array,
        position: int,
        queries: Array,
        out: tuple[Any, ...],
    ) -> None:
        """
        Attend queries float32 [tokens, heads, dim], the first at `position`, over KV blocks that hold the tokens from `starts` on; `out` is (most, weight, summed).
        """

class Collective:
    """A group of tensor-parallel ranks, as one of them sees it."""

    @property
    def rank(self) -> int: ...
    @property
    def ranks(self) -> int: ...
    @property
    def error(self) -> str:
        """Which rank failed and why; empty while none has."""

    def add_sum(self, numbers: Array, out: Array, scale: float = 1.0) -> None:
        """
        out += scale * (sum over ranks, in rank order, of their numbers), float32. RuntimeError: a rank failed.
        """

class SharedMemoryCollective(Collective):
    """Ranks on one host; see csrc/shared_memory.h."""

    def __init__(
        self, fd: int, rank: int, ranks: int, max_floats: int, max_gather_bytes: int, timeout_s: float
    ) -> None:
        """
        Attach to the memory behind `fd`, which may be closed then. ValueError if it is not a group's of these sizes.
        """

    @staticmethod
    def prepare(fd: int, ranks: int, max_floats: int, max_gather_bytes: int) -> None:
        """Give a new memfd its size and header, before any rank attaches."""

    def gather(self, payload: bytes, wanted: bool = True) -> list[Any]:
        """
        What every rank brought, by rank, once all have; empty if not wanted here. RuntimeError: a rank failed.
        """

    def leave(self) -> None:
        """End the group: what others wait for, now or later, fails."""

    @property
    def exchanges(self) -> int:
        """Sums so far."""

    @property
    def exchanged_floats(self) -> int:
        """Numbers that this rank brought to them."""

class CallbackCollective(Collective):
    """Ranks that exchange their numbers through a Python function."""

    def __init__(self, exchange: Callable[..., Any], rank: int, ranks: int, max_floats: int) -> None:
        """
        exchange(terms) gets float32 [ranks, numbers] with row `rank` filled; it fills the others, or raises.
        """
