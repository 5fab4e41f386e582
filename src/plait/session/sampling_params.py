"""What a caller may ask of generation: one frozen value, checked when it is made."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal, cast

from plait.errors import BadRequest

MAX_SAMPLES = 128
MAX_LOGPROBS = 64
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKEN_IDS = 1024
# Nobody has a larger vocabulary, and everything that indexes with a token id can hold it.
TOKEN_ID_LIMIT = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """A language that the output must belong to.

    `kind` says how to read `text`: a JSON schema (as JSON), any JSON object (text ignored), a Rust-style
    regular expression, or a Lark grammar.
    """

    kind: Literal["json_schema", "json_object", "regex", "grammar"]
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to turn logits into tokens; names and defaults are those of vLLM's class of the same name.

    `temperature` 0 is greedy. `top_k` 0 (or -1, as vLLM users write) keeps all tokens. `seed` None lets
    the engine draw one per request. `best_of` samples that many sequences and returns the `n` with the
    highest mean log-probability. `beam_width` above 0 replaces sampling by beam search over the model's own
    log-probabilities: temperature, filters and penalties do not apply.
    `logprobs` is how many alternatives to report beside each chosen token (0: the chosen one only; None:
    nothing). `logit_bias` maps token ids to an additive bias. `max_tokens` None means up to the model's limit.

    Raises:
        BadRequest: a value out of its range; `param` names it.
    """

    n: int = 1
    best_of: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | list[str] | tuple[str, ...] | None = None
    stop_token_ids: list[int] | tuple[int, ...] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    beam_width: int = 0
    length_penalty: float = 1.0
    constraint: Constraint | None = None
    stop_strings: tuple[str, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        for name in _INTEGERS:
            value = getattr(self, name)
            may_be_none = name in _OPTIONAL_INTEGERS and value is None
            _check(may_be_none or isinstance(value, Integral), name, "must be an integer", value)
        # Scripts are not always type-checked: what is not of its declared type is refused by name too.
        stops: Any = self.stop or ()
        good = isinstance(stops, Iterable) and all(isinstance(one, str) for one in cast(Iterable[Any], stops))
        _check(good, "stop", "must be a string or a list of strings", self.stop)
        constraint: Any = self.constraint
        good = constraint is None or isinstance(constraint, Constraint)
        _check(good, "constraint", "must be a plait.Constraint", constraint)
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop_strings", stop)
        stop_token_ids = tuple(self.stop_token_ids or ())
        object.__setattr__(self, "stop_token_ids", stop_token_ids)
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        _check(1 <= self.n <= MAX_SAMPLES, "n", f"must be between 1 and {MAX_SAMPLES}", self.n)
        if self.best_of is not None:
            in_range = self.n <= self.best_of <= MAX_SAMPLES
            _check(in_range, "best_of", f"must be between n ({self.n}) and {MAX_SAMPLES}", self.best_of)
        for name, low, high in _RANGES:
            value = getattr(self, name)
            good = isinstance(value, int | float) and math.isfinite(value) and low <= value <= high
            _check(good, name, f"must be between {low} and {high}", value)
        _check(self.top_p > 0, "top_p", "must be above 0", self.top_p)
        _check(self.top_k >= 0, "top_k", "must be 0 (off) or positive", self.top_k)
        if self.max_tokens is not None:
            _check(self.max_tokens >= 1, "max_tokens", "must be at least 1", self.max_tokens)
            enough = self.min_tokens <= self.max_tokens
            _check(enough, "min_tokens", f"must not exceed max_tokens ({self.max_tokens})", self.min_tokens)
        _check(self.min_tokens >= 0, "min_tokens", "must not be negative", self.min_tokens)
        if self.seed is not None:
            _check(-(2**63) <= self.seed < 2**64, "seed", "must fit in 64 bits", self.seed)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _check(0 <= value <= MAX_LOGPROBS, name, f"must be between 0 and {MAX_LOGPROBS}", value)
        _check(len(stop) <= MAX_STOP_STRINGS, "stop", f"takes at most {MAX_STOP_STRINGS} strings", len(stop))
        _check(all(stop), "stop", "must not contain an empty string", self.stop)
        longest = max(map(len, stop), default=0)
        short = longest <= MAX_STOP_CHARACTERS
        _check(short, "stop", f"takes strings of at most {MAX_STOP_CHARACTERS} characters", longest)
        few = len(stop_token_ids) <= MAX_STOP_TOKEN_IDS
        _check(few, "stop_token_ids", f"takes at most {MAX_STOP_TOKEN_IDS} ids", len(stop_token_ids))
        for token_id in stop_token_ids:
            good = 0 <= token_id < TOKEN_ID_LIMIT
            _check(good, "stop_token_ids", f"must be between 0 and {TOKEN_ID_LIMIT - 1}", token_id)
        for token_id, bias in (self.logit_bias or {}).items():
            good = math.isfinite(bias) and -100 <= bias <= 100 and token_id >= 0
            _check(good, "logit_bias", "maps token ids to numbers between -100 and 100", {token_id: bias})
        if self.beam_width:
            _check(self.n <= self.beam_width, "n", f"must not exceed beam_width ({self.beam_width})", self.n)
            _check(self.best_of is None, "best_of", "cannot be combined with beam_width", self.best_of)
            _check(not stop, "stop", "cannot be combined with beam_width", self.stop)
            _check(
                self.constraint is None, "constraint", "cannot be combined with beam_width", "a constraint"
            )

    @property
    def sequences(self) -> int:
        """Sequences that run side by side for this request."""
        return self.beam_width or self.best_of or self.n

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalised(self) -> bool:
        """Whether earlier tokens change the logits of later ones."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


# Dividing float32 logits by less may overflow.
MIN_REPETITION_PENALTY = 0.01

# Below this temperature dividing float32 logits may overflow; vLLM draws the same line at 1e-5.
GREEDY_BELOW = 1e-5

_OPTIONAL_INTEGERS = ("best_of", "seed", "max_tokens", "logprobs", "prompt_logprobs")
_INTEGERS = ("n", "top_k", "min_tokens", "beam_width", *_OPTIONAL_INTEGERS)
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("temperature", 0.0, 100.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", MIN_REPETITION_PENALTY, 100.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("beam_width", 0, MAX_SAMPLES),
    ("length_penalty", -10.0, 10.0),
)


def _check(good: bool, param: str, rule: str, value: object) -> None:
    if not good:
        raise BadRequest(f"{param} {rule}, not {value!r}", param=param)
