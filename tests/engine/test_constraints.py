"""Whatever the logits are, the output belongs to the language that was asked for."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from plait import Constraint
from plait.engine.constraints import ConstraintCompiler
from plait.engine.tokenizer import Tokenizer
from plait.errors import BadRequest

TINY = Path(__file__).parents[2] / "src/plait/model/tiny"
TINY_ENDS = (0, 4)


def byte_fallback(folder: Path) -> Tokenizer:
    words = [
        *'▁{}[]":,.-0123456789abcdefinrstuvwxyzé你',
        "▁{",
        '":',
        "tr",
        "ue",
        "true",
        "▁fa",
        '"▁',
        "12",
        "▁▁",
    ]
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("▁", "{"), ('"', ":"), ("t", "r"), ("u", "e"), ("tr", "ue"), ("1", "2"), ("▁", "▁")]
    merges = [(a, b) for a, b in merges if a + b in words]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens([AddedToken("</s>", special=True), AddedToken("<|eot|>", special=True)])
    fast.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def byte_level_with_gaps(folder: Path) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: 2 * index for index, character in enumerate(alphabet)}
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken("</s>", special=True)])
    fast.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


Setup = tuple[Tokenizer, ConstraintCompiler, frozenset[int]]


@pytest.fixture(scope="module", params=["tiny", "byte_fallback", "gaps"])
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    if request.param == "tiny":
        tokenizer, ends = Tokenizer(TINY), frozenset(TINY_ENDS)
    else:
        make = {"byte_fallback": byte_fallback, "gaps": byte_level_with_gaps}[request.param]
        tokenizer = make(tmp_path_factory.mktemp(request.param))
        ends = tokenizer.special_token_ids
    return tokenizer, ConstraintCompiler(tokenizer, ends), ends


@pytest.fixture(scope="module")
def tiny() -> ConstraintCompiler:
    return ConstraintCompiler(Tokenizer(TINY), TINY_ENDS)


def bits(mask: np.ndarray, vocab: int) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocab])


def generate(setup: Setup, constraint: Constraint, seed: int, limit_tokens: int = 400) -> str | None:
    """An output under random logits that prefer ending; None if it got too long."""
    tokenizer, compiler, ends = setup
    rng = np.random.default_rng(seed)
    matcher = compiler.matcher(constraint)
    output: list[int] = []
    while len(output) < limit_tokens:
        mask = matcher.allowed()
        assert mask.dtype == np.int32
        assert len(mask) == -(-tokenizer.vocab_tokens // 32)
        allowed = bits(mask, tokenizer.vocab_tokens)
        assert len(allowed) > 0
        assert matcher.is_complete == bool(ends & set(allowed.tolist()))
        closing = [token for token in allowed if tokenizer.token_bytes(token)[:1] in b'"}]']
        token_id = int(rng.choice(closing if closing and rng.random() < 0.2 else allowed))
        if token_id in ends:
            return tokenizer.decode(output)
        assert matcher.accept(token_id)
        output.append(token_id)
        if matcher.is_finished:
            return tokenizer.decode(output)
    return None


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "é你"]}, "minItems": 1, "maxItems": 3},
        "pet": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/pet"}]},
    },
    "required": ["name", "age", "tags", "pet"],
    "additionalProperties": False,
    "$defs": {"pet": {"type": "object", "properties": {"wild": {"type": "boolean"}}, "required": ["wild"]}},
}


def check_person(value: Any) -> None:
    assert list(value) == ["name", "age", "tags", "pet"]
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 12
    assert isinstance(value["age"], int)
    assert 0 <= value["age"] <= 150
    assert 1 <= len(value["tags"]) <= 3
    assert set(value["tags"]) <= {"a", "b", "é你"}
    assert value["pet"] is None or isinstance(value["pet"]["wild"], bool)


@pytest.mark.parametrize("seed", range(6))
def test_every_output_conforms_to_its_json_schema(setup: Setup, seed: int) -> None:
    text = generate(setup, Constraint(kind="json_schema", text=json.dumps(PERSON)), seed)
    if text is not None:
        check_person(json.loads(text))
        assert not re.search(r"\s{2}|\n", re.sub(r'"(\\.|[^"\\])*"', '""', text))


def test_enough_of_those_outputs_end() -> None:
    tokenizer = Tokenizer(TINY)
    setup = tokenizer, ConstraintCompiler(tokenizer, TINY_ENDS), frozenset(TINY_ENDS)
    texts = [
        generate(setup, Constraint(kind="json_schema", text=json.dumps(PERSON)), seed) for seed in range(20)
    ]
    assert sum(text is not None for text in texts) >= 10


@pytest.mark.parametrize("seed", range(4))
def test_any_json_object_is_an_object(setup: Setup, seed: int) -> None:
    text = generate(setup, Constraint(kind="json_object"), seed)
    if text is not None:
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("pattern", [r"[a-c]{2,4}-[0-9]+", "(yes|no)", r'"[^"]*"', "x?", "é|你+"])
@pytest.mark.parametrize("seed", range(3))
def test_every_output_matches_its_regular_expression(setup: Setup, pattern: str, seed: int) -> None:
    text = generate(setup, Constraint(kind="regex", text=pattern), seed)
    if text is not None:
        assert re.fullmatch(pattern, text)


LARK = """
start: sum
sum: term ("+" term)*
term: NUMBER | "(" sum ")"
NUMBER: /[0-9]{1,3}/
"""
GBNF = """
root ::= term ("+" term)*
term ::= [0-9] [0-9]? | "(" root ")"
"""


@pytest.mark.parametrize("grammar", [LARK, GBNF])
@pytest.mark.parametrize("seed", range(3))
def test_every_output_is_a_sentence_of_its_grammar(setup: Setup, grammar: str, seed: int) -> None:
    text = generate(setup, Constraint(kind="grammar", text=grammar), seed)
    if text is not None:
        assert re.fullmatch(r"[0-9+()]+", text)
        assert isinstance(eval(re.sub(r"\b0+(?=[0-9])", "", text), {"__builtins__": {}}), int)


def test_an_output_with_nothing_to_add_is_finished_and_takes_only_end_tokens(
    tiny: ConstraintCompiler,
) -> None:
    tokenizer = Tokenizer(TINY)
    matcher = tiny.matcher(Constraint(kind="regex", text="yes"))
    for token_id in tokenizer.encode("yes"):
        assert not matcher.is_finished
        assert matcher.accept(token_id)
    assert matcher.is_finished
    assert matcher.is_complete
    assert bits(matcher.allowed(), 2048).tolist() == list(TINY_ENDS)
    assert matcher.accept(4)
    assert matcher.is_finished


def test_an_optional_rest_allows_both_the_end_and_more(tiny: ConstraintCompiler) -> None:
    tokenizer = Tokenizer(TINY)
    matcher = tiny.matcher(Constraint(kind="regex", text="yes!*"))
    for token_id in tokenizer.encode("yes"):
        matcher.accept(token_id)
    allowed = set(bits(matcher.allowed(), 2048).tolist())
    assert set(TINY_ENDS) <= allowed
    assert tokenizer.encode("!")[0] in allowed
    assert matcher.is_complete
    assert not matcher.is_finished


def test_a_token_that_is_not_allowed_is_refused_and_nothing_follows(tiny: ConstraintCompiler) -> None:
    matcher = tiny.matcher(Constraint(kind="regex", text="yes"))
    assert not matcher.accept(Tokenizer(TINY).encode("n")[0])
    assert not matcher.allowed().any()
    assert not matcher.is_complete
    assert not matcher.is_finished


def test_a_fork_goes_on_independently(tiny: ConstraintCompiler) -> None:
    tokenizer = Tokenizer(TINY)
    first = tiny.matcher(Constraint(kind="regex", text="[ab]c"))
    first.accept(tokenizer.encode("a")[0])
    second = first.fork()
    assert second.accept(tokenizer.encode("c")[0])
    assert second.is_finished
    assert not first.is_finished
    assert first.accept(tokenizer.encode("c")[0])
    assert first.is_finished


def test_special_tokens_are_never_part_of_a_constrained_output(tiny: ConstraintCompiler) -> None:
    matcher = tiny.matcher(Constraint(kind="regex", text="(.|\n)+"))
    specials = Tokenizer(TINY).special_token_ids
    assert not specials & set(bits(matcher.allowed(), 2048).tolist())


@pytest.mark.parametrize(
    ("kind", "text", "param"),
    [
        ("regex", "(((", "regex"),
        ("regex", r"[^\s\S]", "regex"),
        ("regex", r"(a)\1", "regex"),
        ("grammar", "start: (", "grammar"),
        ("grammar", "", "grammar"),
        ("grammar", "start: undefined_rule", "grammar"),
        ("grammar", "root ::= undefined", "grammar"),
        ("grammar", "::=", "grammar"),
        ("json_schema", "{", "response_format"),
        ("json_schema", "[]", "response_format"),
        ("json_schema", "false", "response_format"),
        ("json_schema", '{"type": "foo"}', "response_format"),
        ("json_schema", '{"$ref": "http://example.com/x.json"}', "response_format"),
        ("json_schema", '{"$ref": "#/$defs/absent"}', "response_format"),
        ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}', "response_format"),
        ("json_schema", "[" * 100_000, "response_format"),
        ("json_schema", "[" * 30_000 + "]" * 30_000, "response_format"),
        ("json_schema", '{"not":' * 70 + "{}" + "}" * 70, "response_format"),
        ("regex", "a" * 5_000, "regex"),
        ("regex", ".*" * 20_000, "regex"),
        ("grammar", 'start: "' + "a" * 70_000 + '"', "grammar"),
    ],
    ids=lambda value: value[:20],
)
def test_a_bad_constraint_is_a_bad_request_that_names_its_field(
    tiny: ConstraintCompiler, kind: Any, text: str, param: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        tiny.matcher(Constraint(kind=kind, text=text))
    assert caught.value.param == param
    assert len(caught.value.message) < 600


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "((a{1,500}){1,500}){1,500}b"),
        ("regex", "(a|b|ab)*" * 450),
        ("regex", ".*" * 2000),
        ("regex", "(.*a.{20}|.*b.{19}|.*c.{18})*"),
        ("grammar", "start: s\ns: s s | s s s | /a/ |"),
        (
            "grammar",
            "start: "
            + " ".join(f"r{i}" for i in range(2000))
            + "\n"
            + "\n".join(f'r{i}: "a"?' for i in range(2000)),
        ),
        (
            "json_schema",
            json.dumps({"anyOf": [{"type": "object", "properties": {f"p{i}": {}}} for i in range(300)]}),
        ),
        ("json_schema", json.dumps({"type": "string", "minLength": 1_000_000})),
        ("json_schema", json.dumps({"type": "array", "minItems": 100_000, "items": {"type": "integer"}})),
        ("json_schema", json.dumps({"type": "object", "properties": {f"p{i}": {} for i in range(2000)}})),
    ],
    ids=lambda value: value[:30],
)
def test_a_hostile_constraint_costs_little_or_is_refused(
    tiny: ConstraintCompiler, kind: Any, text: str
) -> None:
    """Nothing raises, nothing hangs: what is too complex to compile or to follow is refused."""
    rng = np.random.default_rng(0)
    try:
        matcher = tiny.matcher(Constraint(kind=kind, text=text))
    except BadRequest:
        return
    for _ in range(30):
        allowed = bits(matcher.allowed(), 2048)
        if len(allowed) == 0 or matcher.is_finished:
            break
        if not matcher.accept(int(rng.choice(allowed))):
            assert not matcher.allowed().any()
            break


def test_one_of_is_read_as_any_of(tiny: ConstraintCompiler) -> None:
    cases = [
        {"type": "object", "properties": {"kind": {"const": kind}}, "required": ["kind"]} for kind in "ab"
    ]
    tokenizer = Tokenizer(TINY)
    setup = tokenizer, tiny, frozenset(TINY_ENDS)
    texts = [
        generate(setup, Constraint(kind="json_schema", text=json.dumps({"oneOf": cases})), n)
        for n in range(8)
    ]
    assert {json.loads(text)["kind"] for text in texts if text is not None} <= {"a", "b"}
    assert any(texts)


def test_compiled_constraints_are_kept_up_to_a_bound() -> None:
    compiler = ConstraintCompiler(Tokenizer(TINY), TINY_ENDS, max_cached=3)
    totals: list[int] = []
    for text in "ababcadeab":
        compiler.matcher(Constraint(kind="regex", text=text))
        totals.append(compiler.compiled_total)
    assert totals == [1, 2, 2, 2, 3, 3, 4, 5, 5, 6]


def test_a_model_without_end_tokens_cannot_be_constrained() -> None:
    compiler = ConstraintCompiler(Tokenizer(TINY), ())
    with pytest.raises(BadRequest, match="no end token"):
        compiler.matcher(Constraint(kind="json_object"))
