"""Outputs that must belong to a language: JSON schemas, regular expressions and grammars, by llguidance.

A `Constraint` is compiled once and kept; every sequence has a matcher of its own, which says before each
token which ones may follow. The cost of a hostile constraint is bounded by the length and nesting of its text
and by llguidance's limits on lexer and parser work, at compilation and again at each token.

JSON is generated compactly: one space after commas and colons and none elsewhere, because a small model
that may put any white space between tokens often never stops doing so.
"""

import json
from collections import OrderedDict
from collections.abc import Iterable
from threading import Lock
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import gbnf_to_lark

from plait.engine.tokenizer import Tokenizer
from plait.errors import BadRequest
from plait.session import Constraint

# A JSON schema of 64 KiB describes hundreds of fields; larger ones are refused unread.
MAX_CONSTRAINT_CHARACTERS = 64 * 1024
# Hostile regular expressions take time that grows with the square of their length, whatever llguidance's
# limits: `.*` two thousand times half a second, twenty thousand times more than a minute.
MAX_REGEX_CHARACTERS = 4 * 1024
# Deeper than any schema a person writes, shallower than what recursive code can take.
MAX_NESTING = 64
MAX_CACHED_CONSTRAINTS = 32

# Below llguidance's defaults. By its documentation 50k units of fuel take 1 ms at the start and 14k units 1 ms at
# each token (10 ms and 4 ms at most, and all streams wait for each token), and a lexer state 2 kB (50 MB at most
# for one constraint, 1.6 GB for all that are cached).
_LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=50_000,
    step_max_items=50_000,
    max_lexer_states=25_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
# `oneOf` is read as `anyOf` where llguidance cannot prove the cases disjoint, as most unions are.
_JSON_OPTIONS: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,
}
_PARAMS = {
    "json_schema": "response_format",
    "json_object": "response_format",
    "regex": "regex",
    "grammar": "grammar",
}


class Matcher:
    """Where one sequence stands in its language."""

    def __init__(self, matcher: LLMatcher, vocab_tokens: int) -> None:
        self._matcher = matcher
        self._vocab_tokens = vocab_tokens

    def allowed(self) -> npt.NDArray[np.int32]:
        """One bit per token id, lowest bit first: the tokens that may come next.

        End tokens are allowed wherever the output so far is complete. All zero if the constraint grew too
        complex to follow, or a token was accepted that it does not allow.
        """
        words = -(-self._vocab_tokens // 32)
        if self._matcher.is_error():
            return np.zeros(words, dtype=np.int32)
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32)[:words]
        return np.zeros(words, dtype=np.int32) if self._matcher.is_error() else mask

    def accept(self, token_id: int) -> bool:
        """Move on by one token; False if the language does not allow it. An end token changes nothing."""
        if self._matcher.is_stopped():
            return not self._matcher.is_error()
        return self._matcher.consume_token(token_id)

    @property
    def is_finished(self) -> bool:
        """Whether the output is complete and nothing can be added to it."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def is_complete(self) -> bool:
        """Whether the output so far belongs to the language."""
        return not self._matcher.is_error() and self._matcher.is_accepting()

    def fork(self) -> "Matcher":
        """A matcher at the same place that goes on independently."""
        return Matcher(self._matcher.deep_copy(), self._vocab_tokens)


class ConstraintCompiler:
    """Compiles constraints for one tokenizer; safe to call from several threads.

    The tokenizer's tables are built at the first use, which takes about a second for a large vocabulary.
    """

    def __init__(
        self, tokenizer: Tokenizer, eos_token_ids: Iterable[int], *, max_cached: int = MAX_CACHED_CONSTRAINTS
    ) -> None:
        self.compiled_total = 0
        """How often a constraint was not among those kept."""
        self._max_cached = max_cached
        self._tokenizer = tokenizer
        self._eos_token_ids = sorted(eos_token_ids)
        self._compiled: OrderedDict[Constraint, LLMatcher] = OrderedDict()
        self._table: LLTokenizer | None = None
        self._lock = Lock()
        self._compile_lock = Lock()

    def matcher(self, constraint: Constraint) -> Matcher:
        """A matcher at the start of a constraint's language.

        Raises:
            BadRequest: the constraint is malformed, empty of outputs, or too large.
        """
        matcher = self._kept(constraint)
        if matcher is not None:
            return matcher
        with self._compile_lock:
            # Another thread may have compiled it meanwhile.
            matcher = self._kept(constraint)
            return matcher if matcher is not None else self._keep(constraint, self._compile(constraint))

    def _kept(self, constraint: Constraint) -> Matcher | None:
        with self._lock:
            start = self._compiled.get(constraint)
            if start is None:
                return None
            self._compiled.move_to_end(constraint)
            return Matcher(start.deep_copy(), self._tokenizer.vocab_tokens)

    def _keep(self, constraint: Constraint, start: LLMatcher) -> Matcher:
        with self._lock:
            self._compiled[constraint] = start
            if len(self._compiled) > self._max_cached:
                self._compiled.popitem(last=False)
            return Matcher(start.deep_copy(), self._tokenizer.vocab_tokens)

    def _compile(self, constraint: Constraint) -> LLMatcher:
        self.compiled_total += 1
        param = _PARAMS[constraint.kind]
        grammar = _grammar_of(constraint)
        if self._table is None:
            self._table = _token_table(self._tokenizer, self._eos_token_ids)
        matcher = LLMatcher(self._table, grammar, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise BadRequest(
                f"the {_title(constraint)} cannot be used: {_first_line(matcher.get_error())}", param=param
            )
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.int32)
        if matcher.is_error():
            raise BadRequest(
                f"the {_title(constraint)} cannot be used: {_first_line(matcher.get_error())}", param=param
            )
        if not mask.any():
            raise BadRequest(f"no output of this model can match the {_title(constraint)}", param=param)
        return matcher


class _TokenSource:
    """What llguidance wants to know of a tokenizer, from ours."""

    def __init__(self, tokenizer: Tokenizer, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id
        self.bos_token_id = tokenizer.bos_token_id
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_tokens)]
        self.special_token_ids = sorted(tokenizer.special_token_ids)
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, parse_special=False)


def _token_table(tokenizer: Tokenizer, eos_token_ids: list[int]) -> LLTokenizer:
    if not eos_token_ids:
        raise BadRequest(
            "this model has no end token, so its output cannot be constrained", param="response_format"
        )
    source = TokenizerWrapper(_TokenSource(tokenizer, eos_token_ids[0]))
    return LLTokenizer(source, n_vocab=tokenizer.vocab_tokens, eos_token=eos_token_ids)


def _grammar_of(constraint: Constraint) -> str:
    """Translate a constraint to llguidance's own form.

    Raises:
        BadRequest: it is too large, or not even readable.
    """
    text, param = constraint.text, _PARAMS[constraint.kind]
    most = MAX_REGEX_CHARACTERS if constraint.kind == "regex" else MAX_CONSTRAINT_CHARACTERS
    if len(text) > most:
        raise BadRequest(
            f"the {_title(constraint)} has {len(text)} characters; at most {most} are taken", param=param
        )
    try:
        if constraint.kind == "regex":
            return LLMatcher.grammar_from_regex(text)
        if constraint.kind == "grammar":
            return LLMatcher.grammar_from_lark(_lark_of(text))
        schema: Any = {"type": "object"} if constraint.kind == "json_object" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the {_title(constraint)} cannot be read: {error}", param=param) from error
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise BadRequest(f"a JSON schema must be an object, not {schema!r:.100}", param=param)
    if _nesting(cast("dict[str, Any]", schema)) > MAX_NESTING:
        raise BadRequest(f"the JSON schema nests deeper than {MAX_NESTING} levels", param=param)
    return LLMatcher.grammar_from_json_schema(cast("dict[str, Any]", schema), overrides=_JSON_OPTIONS)


def _lark_of(grammar: str) -> str:
    """Lark as it is; the GBNF of llama.cpp and XGrammar (`root ::= ...`) translated."""
    if "::=" not in grammar:
        return grammar
    try:
        return gbnf_to_lark(grammar)
    except Exception as error:  # the converter raises bare Exception for what it cannot read
        raise ValueError(str(error)) from error


def _nesting(value: Any) -> int:
    """How deep lists and objects nest, without recursion."""
    deepest = 0
    waiting: list[tuple[Any, int]] = [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        if isinstance(item, dict | list):
            deepest = max(deepest, depth)
            inner = (
                cast("dict[Any, Any]", item).values() if isinstance(item, dict) else cast("list[Any]", item)
            )
            waiting.extend((each, depth + 1) for each in inner)
    return deepest


def _title(constraint: Constraint) -> str:
    return {"json_schema": "JSON schema", "json_object": "JSON schema", "regex": "regular expression"}.get(
        constraint.kind, "grammar"
    )


def _first_line(error: str) -> str:
    return " ".join(error.split("<state>")[0].split())[:300]
