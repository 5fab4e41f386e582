# pyright: standard
"""Text to token ids and back, and conversations to prompts: the tokenizer files of a checkpoint folder."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from plait.engine.chat_template import ChatTemplate, ControlTokens
from plait.errors import BadRequest, BadSetup

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """The tokenizer of one checkpoint folder.

    Reads `tokenizer.json`, or else `vocab.json` with `merges.txt` (byte-level BPE as GPT-2's), then
    `tokenizer_config.json` and the chat template beside them. `model_vocab_tokens` is how many rows the
    model's embedding has; ids above the tokenizer's own are padding. `chat_template` replaces the folder's
    own: the path of a file, or the template itself.

    Raises:
        BadSetup: a file is missing or broken, or the tokenizer has ids that the model has no row for.
    """

    def __init__(
        self, folder: Path, *, model_vocab_tokens: int | None = None, chat_template: str | None = None
    ) -> None:
        self.folder = folder
        config = _read_object(folder / "tokenizer_config.json")
        for name, value in _read_object(folder / "special_tokens_map.json").items():
            config.setdefault(name, value)
        self._fast = _load(folder, config)
        self._fast.no_truncation()
        self._fast.no_padding()
        self.named_tokens = _named_tokens(config)
        added = self._fast.get_added_tokens_decoder()
        vocab = self._fast.get_vocab(with_added_tokens=True)
        self.vocab_tokens = max(vocab.values(), default=-1) + 1
        """One more than the highest token id."""
        self.special_token_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.pieces: tuple[dict[int, Any], dict[int, Any]] = ({}, {})
        """What single tokens decode to, as detokenizers learn it: with special tokens, and without."""
        self._added_text = {token_id: token.content for token_id, token in added.items()}
        self.control_tokens = ControlTokens(
            tuple(added[token_id].content for token_id in self.special_token_ids)
        )
        self.bos_token_id = self.token_id(self.named_tokens.get("bos_token"))
        self.eos_token_id = self.token_id(self.named_tokens.get("eos_token"))
        self._templates = _read_templates(folder, config, chat_template)
        if model_vocab_tokens is not None and self.vocab_tokens > model_vocab_tokens:
            raise BadSetup(
                f"the tokenizer in {folder} has token ids up to {self.vocab_tokens - 1}, but the model's "
                f"embedding has {model_vocab_tokens} rows: they do not belong together; use the tokenizer "
                "files that came with this model"
            )

    @cached_property
    def decoder_config(self) -> Mapping[str, Any] | None:
        """The `decoder` object of tokenizer.json: how token strings become text."""
        return json.loads(self._fast.to_str())["decoder"]

    @cached_property
    def _without_specials(self) -> FastTokenizer:
        """A copy that reads special tokens in text as plain text."""
        copy = FastTokenizer.from_str(self._fast.to_str())
        copy.encode_special_tokens = True
        return copy

    def token_id(self, content: str | None) -> int | None:
        """Look up a token by its exact content."""
        return None if content is None else self._fast.token_to_id(content)

    def token_content(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it (`Ġthe`, `▁the`, `<0x0A>`); None for an id without one."""
        return self._fast.id_to_token(token_id)

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Turn text into token ids.

        `add_special_tokens` adds what the model expects around a text (often a BOS token); a rendered chat
        has it already. `parse_special` False reads `<|eot_id|>` in the text as those ten characters.
        """
        fast = self._fast if parse_special else self._without_specials
        # Unlike `encode`, this lets other threads run meanwhile (4 s for 1 MB), and leaves out offsets.
        return fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Turn token ids into text; bytes that are not UTF-8 become U+FFFD.

        `clean_up_tokenization_spaces` of old configurations is not applied: it would change what the model
        said.
        """
        known = [token_id for token_id in token_ids if 0 <= token_id < self.vocab_tokens]
        return self._fast.decode(known, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for inside a text; empty for an id without a token."""
        content = self._fast.id_to_token(token_id)
        if content is None:
            return b""
        if token_id in self._added_text:
            return content.encode()
        if self.is_byte_level:
            try:
                return bytes(BYTE_OF_CHARACTER[character] for character in content)
            except KeyError:
                return content.encode()
        match = BYTE_TOKEN.fullmatch(content)
        if match is not None and self.has_byte_fallback:
            return bytes([int(match[1], 16)])
        return content.replace("▁", " ").encode()

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether token strings spell bytes in GPT-2's alphabet."""
        return {step["type"] for step in decoder_steps(self.decoder_config)} - {"Fuse"} == {"ByteLevel"}

    @cached_property
    def has_byte_fallback(self) -> bool:
        """Whether tokens such as `<0x0A>` stand for single bytes."""
        return any(step["type"] == "ByteFallback" for step in decoder_steps(self.decoder_config))

    @property
    def chat_template_source(self) -> str:
        """The template's text, to recognise a model's tool-call format by; empty if there is none."""
        return self._templates["default"].source if self._templates else ""

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        *,
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """Write a conversation with the model's chat template; see `ChatTemplate.render`.

        Raises:
            BadRequest: there is no template, or it refuses this conversation.
        """
        return self._template(tools).render(
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables={**self.named_tokens, **variables},
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        *,
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> list[int]:
        """Turn a conversation into token ids, where only the template can write control tokens.

        Special tokens that a message, a tool or a variable spells are encoded as plain text. A conversation
        without any gives exactly `encode(render_chat(...), add_special_tokens=False)`.
        """
        mark = self.control_tokens.mark
        text = self.render_chat(
            mark(messages),
            mark(tools),
            add_generation_prompt,
            documents=mark(documents),
            continue_final_message=continue_final_message,
            **mark(variables),
        )
        pieces = self.control_tokens.pieces(text)
        token_ids: list[int] = []
        for index, (piece, is_marked) in enumerate(pieces):
            if index == 0 and not is_marked:
                token_ids += self.encode(piece, add_special_tokens=False)
            else:
                token_ids += self._encode_inside(piece, parse_special=not is_marked)
        return token_ids

    def _encode_inside(self, text: str, *, parse_special: bool) -> list[int]:
        """Encode text from the middle of a longer one: without the space that some put before a text."""
        newline = self.encode("\n", add_special_tokens=False)
        token_ids = self.encode("\n" + text, add_special_tokens=False, parse_special=parse_special)
        if token_ids[: len(newline)] == newline:
            return token_ids[len(newline) :]
        return self.encode(text, add_special_tokens=False, parse_special=parse_special)

    def _template(self, tools: Sequence[Mapping[str, Any]] | None) -> ChatTemplate:
        if not self._templates:
            raise BadRequest(
                f"the model in {self.folder} has no chat template; use /v1/completions, "
                "or start the server with --chat-template FILE",
                param="messages",
            )
        if tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        return self._templates["default"]


def decoder_steps(decoder: Mapping[str, Any] | None) -> tuple[Mapping[str, Any], ...]:
    """Flatten the `decoder` of a tokenizer.json into its steps, in order."""
    if decoder is None:
        return ()
    if decoder["type"] == "Sequence":
        return tuple(step for inner in decoder["decoders"] for step in decoder_steps(inner))
    return (decoder,)


def _byte_alphabet() -> dict[str, int]:
    """The byte of each printable character of GPT-2 (openai/gpt-2, src/encoder.py, `bytes_to_unicode`)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_alphabet()


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; a file that is not there is an empty one."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except ValueError as error:
        raise BadSetup(f"{path} cannot be read as JSON: {error}; download it again") from error
    if not isinstance(value, dict):
        raise BadSetup(f"{path} must hold a JSON object, not {type(value).__name__}")
    return cast("dict[str, Any]", value)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadSetup(f"{path} cannot be read: {error}; download it again") from error


def _load(folder: Path, config: Mapping[str, Any]) -> FastTokenizer:
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # the binding raises bare Exception for every kind of broken file
            raise BadSetup(
                f"{path} is not a tokenizer that can be loaded: {error}; download it again"
            ) from error
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        fast = _load_gpt2(folder, config)
    elif (folder / "tokenizer.model").is_file():
        raise BadSetup(
            f"{folder} has only tokenizer.model; convert it once with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes tokenizer.json"
        )
    else:
        raise BadSetup(
            f"{folder} has no tokenizer.json (nor vocab.json with merges.txt); download the whole model"
        )
    _add_configured_tokens(fast, folder, config)
    return fast


def _load_gpt2(folder: Path, config: Mapping[str, Any]) -> FastTokenizer:
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the binding raises bare Exception for every kind of broken file
        raise BadSetup(f"vocab.json and merges.txt in {folder} cannot be loaded: {error}") from error
    fast = FastTokenizer(model)
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(config.get("add_prefix_space", False))
    )
    fast.decoder = decoders.ByteLevel()
    named = _named_tokens(config) or {"eos_token": "<|endoftext|>"}
    contents = [content for content in named.values() if fast.token_to_id(content) is not None]
    fast.add_special_tokens([AddedToken(content, special=True, normalized=False) for content in contents])
    bos, eos = (
        named[f"{end}_token"]
        if config.get(f"add_{end}_token") and named.get(f"{end}_token") in contents
        else ""
        for end in ("bos", "eos")
    )
    fast.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}".split(),
        special_tokens=[(content, cast("int", fast.token_to_id(content))) for content in {bos, eos} - {""}],
    )
    return fast


def _add_configured_tokens(fast: FastTokenizer, folder: Path, config: Mapping[str, Any]) -> None:
    """Add the tokens that only tokenizer_config.json or added_tokens.json name, in the order of their ids.

    Those with a role are special even where the vocabulary has them as ordinary tokens.
    """
    try:
        tokens = {
            int(token_id): AddedToken(content, special=False, normalized=False)
            for content, token_id in _read_object(folder / "added_tokens.json").items()
        }
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        for token_id, entry in dict(config.get("added_tokens_decoder") or {}).items():
            options = {name: bool(entry[name]) for name in flags if name in entry}
            tokens[int(token_id)] = AddedToken(entry["content"], **options)
    except (KeyError, TypeError, ValueError) as error:
        raise BadSetup(
            f"{folder}: the added tokens are malformed ({error!r}); download the files again"
        ) from error
    present = fast.get_added_tokens_decoder()
    contents = {token.content for token in (*present.values(), *tokens.values())}
    for content in _named_tokens(config).values():
        token_id = fast.token_to_id(content)
        if token_id is not None and content not in contents:
            tokens[token_id] = AddedToken(content, special=True)
    for token_id, token in sorted(tokens.items()):
        if token_id in present and repr(present[token_id]) == repr(token):
            continue
        fast.add_special_tokens([token]) if token.special else fast.add_tokens([token])
        if fast.token_to_id(token.content) != token_id:
            raise BadSetup(
                f"{folder}: token {token.content!r} must have id {token_id}, but the vocabulary puts it at "
                f"{fast.token_to_id(token.content)}; the tokenizer files do not belong together"
            )


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The tokens with a role (`bos_token`, `image_token`, ...), which templates may use by that name."""
    named: dict[str, str] = {}
    for name, value in config.items():
        content = cast("Mapping[str, Any]", value).get("content") if isinstance(value, Mapping) else value
        if name.endswith("_token") and isinstance(content, str):
            named[name] = content
    return named


def _read_templates(folder: Path, config: Mapping[str, Any], override: str | None) -> dict[str, ChatTemplate]:
    """Find the chat templates by name; there is always a "default" among them, or none at all.

    Files of their own come first, then tokenizer_config.json, then the chat_template.json of processors.
    """
    if override is not None:
        return {"default": _override_template(override)}
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    sources = {name: (_read_text(path), path) for name, path in files.items()}
    if not sources:
        path = folder / "tokenizer_config.json"
        value = config.get("chat_template")
        if value is None:
            path = folder / "chat_template.json"
            value = _read_object(path).get("chat_template")
        if isinstance(value, str):
            sources["default"] = (value, path)
        elif isinstance(value, list):
            named = cast("list[Mapping[str, Any]]", value)
            sources = {entry["name"]: (entry["template"], path) for entry in named}
    if sources and "default" not in sources:
        raise BadSetup(
            f"{folder} has chat templates {sorted(sources)} but none named 'default'; "
            "pass one with --chat-template"
        )
    return {name: ChatTemplate(source, str(path)) for name, (source, path) in sources.items()}


def _override_template(override: str) -> ChatTemplate:
    if "{" in override or "\n" in override:
        return ChatTemplate(override, "--chat-template")
    path = Path(override)
    if not path.is_file():
        raise BadSetup(f"--chat-template {override!r} is neither a file nor a Jinja template")
    return ChatTemplate(_read_text(path), override)
