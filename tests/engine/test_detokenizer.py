"""Incremental text equals the whole decode, wherever it is cut."""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from plait.engine.detokenizer import IncrementalDetokenizer
from plait.engine.tokenizer import Tokenizer
from plait.errors import BadSetup

TINY = Path(__file__).parents[2] / "src/plait/model/tiny"
CORPUS = [
    "the quick brown fox jumps over the lazy dog, and then it rests; 1234 times.",
    "def main():\n    print('hello, world')\n\n\treturn 0",
    "Füße, naïve café, Ελληνικά, русский, 你好世界, 😀👍🏽",
]
SPECIALS = [AddedToken("<s>", special=True), AddedToken("</s>", special=True)]
# Added tokens that are also spelled in the alphabet of byte-level BPE, or like byte tokens.
ADDED = [AddedToken("<tool>"), AddedToken("é"), AddedToken("▁▁▁")]


def byte_level() -> FastTokenizer:
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return fast


def byte_fallback_vocab() -> models.BPE:
    words = ["▁", "a", "b", "c", "l", "o", "▁a", "lo", "▁lo", "你", "é", "▁▁", "!", "\n"]
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("▁", "a"), ("l", "o"), ("▁", "lo"), ("▁", "▁")]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    return models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def llama_2() -> FastTokenizer:
    fast = FastTokenizer(byte_fallback_vocab())
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    fast.decoder = decoders.Sequence(steps)
    return fast


def gemma() -> FastTokenizer:
    fast = FastTokenizer(byte_fallback_vocab())
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return fast


def metaspace() -> FastTokenizer:
    fast = FastTokenizer(
        models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("▁▁a", -2.0), ("a", -2.0), ("你", -3.0)], 0)
    )
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    fast.decoder = decoders.Metaspace(prepend_scheme="always")
    return fast


def metaspace_never() -> FastTokenizer:
    fast = metaspace()
    fast.decoder = decoders.Metaspace(prepend_scheme="never")
    return fast


def no_decoder() -> FastTokenizer:
    return FastTokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "": 3}, unk_token="<unk>"))


def strip_each() -> FastTokenizer:
    fast = gemma()
    steps = [decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence(steps)
    return fast


KINDS = {
    make.__name__: make
    for make in (byte_level, llama_2, gemma, metaspace, metaspace_never, no_decoder, strip_each)
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    opened = {"tiny": Tokenizer(TINY)}
    for name, make in KINDS.items():
        fast = make()
        fast.add_special_tokens(SPECIALS)
        fast.add_tokens(ADDED)
        folder = tmp_path_factory.mktemp(name)
        fast.save(str(folder / "tokenizer.json"))
        opened[name] = Tokenizer(folder)
    return opened


def streamed(
    tokenizer: Tokenizer, parts: list[list[int]], **options: object
) -> tuple[list[str], IncrementalDetokenizer]:
    detokenizer = IncrementalDetokenizer(tokenizer, **options)  # type: ignore[arg-type]
    texts = [detokenizer.push(part)[0] for part in parts]
    return [*texts, detokenizer.flush()], detokenizer


def cut(token_ids: list[int], seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    parts: list[list[int]] = [[]]
    for token_id in token_ids:
        parts[-1].append(token_id)
        if rng.random() < 0.7:
            parts.append([])
    return parts


@pytest.mark.parametrize("kind", ["tiny", *KINDS])
@pytest.mark.parametrize("skip", [True, False])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_pushed_text_concatenates_to_the_whole_decode_of_any_token_ids(
    tokenizers: dict[str, Tokenizer], kind: str, skip: bool, data: st.DataObject
) -> None:
    tokenizer = tokenizers[kind]
    token_ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_tokens + 2), max_size=40))
    parts = cut(token_ids, data.draw(st.integers(0, 1000)))
    texts, _ = streamed(tokenizer, parts, skip_special_tokens=skip)
    assert "".join(texts) == tokenizer.decode(token_ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["tiny", "byte_level", "llama_2", "gemma"])
@given(text=st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back_whole_from_its_tokens(
    tokenizers: dict[str, Tokenizer], kind: str, text: str
) -> None:
    tokenizer = tokenizers[kind]
    token_ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    texts, _ = streamed(tokenizer, [[token_id] for token_id in token_ids])
    assert "".join(texts) == tokenizer.decode(token_ids)
    if kind == "tiny":
        assert "".join(texts) == text


@pytest.mark.parametrize("kind", ["tiny", "byte_level", "llama_2", "gemma"])
def test_only_whole_characters_are_sent_before_the_end(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    token_ids = tokenizer.encode("a 👍🏽 ñ", add_special_tokens=False, parse_special=False)
    texts, _ = streamed(tokenizer, [[token_id] for token_id in token_ids])
    assert not any("\ufffd" in text for text in texts)
    texts, _ = streamed(tokenizer, [[token_id] for token_id in token_ids[:3]])
    assert "\ufffd" not in "".join(texts[:-1])
    assert "".join(texts) == tokenizer.decode(token_ids[:3])


@pytest.mark.parametrize("kind", ["tiny", "llama_2"])
@given(
    text=st.text(alphabet="ablo 你é\n", max_size=30),
    stops=st.lists(st.text(alphabet="ablo 你é\n", min_size=1, max_size=4), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    include=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_a_text_is_cut_at_the_match_that_ends_first_however_it_falls_into_tokens(
    tokenizers: dict[str, Tokenizer], kind: str, text: str, stops: list[str], seed: int, include: bool
) -> None:
    tokenizer = tokenizers[kind]
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(token_ids)
    texts, detokenizer = streamed(tokenizer, cut(token_ids, seed), stop_strings=stops, include_stop=include)
    ends = [end for end in range(len(whole) + 1) if any(whole[:end].endswith(stop) for stop in stops)]
    if not ends:
        assert ("".join(texts), detokenizer.stop_string) == (whole, None)
        return
    found = max((stop for stop in stops if whole[: ends[0]].endswith(stop)), key=len)
    assert detokenizer.stop_string == found
    assert "".join(texts) == whole[: ends[0] if include else ends[0] - len(found)]


def test_text_before_a_stop_string_is_sent_as_soon_as_it_cannot_belong_to_it(
    tokenizers: dict[str, Tokenizer],
) -> None:
    tokenizer = tokenizers["tiny"]
    letters = [tokenizer.encode(letter)[0] for letter in "xSTSTOPy"]
    detokenizer = IncrementalDetokenizer(tokenizer, ["STOP"])
    said = [detokenizer.push([letter]) for letter in letters]
    assert [text for text, _ in said] == ["x", "", "", "ST", "", "", "", ""]
    assert [stop for _, stop in said] == [None] * 6 + ["STOP"] * 2
    assert detokenizer.flush() == ""


def test_tokens_before_min_tokens_neither_stop_nor_begin_a_stop_string(
    tokenizers: dict[str, Tokenizer],
) -> None:
    tokenizer = tokenizers["tiny"]
    letters = [tokenizer.encode(letter)[0] for letter in "STOPSTOP"]
    detokenizer = IncrementalDetokenizer(tokenizer, ["STOP"])
    said = [detokenizer.push([letter], match_stops=index > 2) for index, letter in enumerate(letters)]
    assert "".join(text for text, _ in said) == "STOP"
    assert said[-1][1] == "STOP"


def test_a_fork_goes_on_independently(tokenizers: dict[str, Tokenizer]) -> None:
    for kind in ("tiny", "llama_2"):
        tokenizer = tokenizers[kind]
        token_ids = tokenizer.encode("a 你 lo é a", add_special_tokens=False)
        for at in range(len(token_ids) + 1):
            first = IncrementalDetokenizer(tokenizer, ["lo!"])
            begin = first.push(token_ids[:at])[0]
            second = first.fork()
            rest = first.push(token_ids[at:])[0] + first.flush()
            other = second.push(token_ids[:2])[0] + second.flush()
            assert begin + rest == tokenizer.decode(token_ids)
            assert begin + other == tokenizer.decode(token_ids[:at] + token_ids[:2])


def test_text_that_continues_a_prompt_keeps_its_first_space(tokenizers: dict[str, Tokenizer]) -> None:
    for kind in ("llama_2", "metaspace"):
        tokenizer = tokenizers[kind]
        token_ids = [tokenizer.token_id("▁"), tokenizer.token_id("a")]
        assert "".join(streamed(tokenizer, [token_ids])[0]) == "a"
        assert "".join(streamed(tokenizer, [token_ids], continues_text=True)[0]) == " a"


def test_an_unknown_decoder_is_refused_by_name(tmp_path: Path) -> None:
    fast = no_decoder()
    fast.decoder = decoders.CTC()
    fast.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BadSetup, match="CTC"):
        IncrementalDetokenizer(Tokenizer(tmp_path))
