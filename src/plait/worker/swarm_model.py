"""The model of a swarm as far as a gateway needs it: its tokenizer and configuration, and no weights."""

from dataclasses import dataclass
from pathlib import Path

from plait.engine import Tokenizer, open_checkpoint
from plait.errors import BadSetup


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmModel:
    """What a gateway knows of the model that its swarm serves; `fingerprint` is that of the records."""

    fingerprint: str
    blocks: int
    vocab_tokens: int
    max_model_tokens: int
    eos_token_ids: frozenset[int]
    tokenizer: Tokenizer


def read_swarm_model(
    folder: Path, *, max_model_tokens: int | None = None, chat_template: str | None = None
) -> SwarmModel:
    """Read a checkpoint folder as far as a gateway needs it.

    Raises:
        BadSetup: the folder is not a model that can be served, or its context is shorter than asked for.
    """
    checkpoint = open_checkpoint(folder)
    spec = checkpoint.spec
    if max_model_tokens is not None and not 1 < max_model_tokens <= spec.max_model_tokens:
        raise BadSetup(
            f"--max-model-len {max_model_tokens} must be between 2 and this model's own limit of "
            f"{spec.max_model_tokens} tokens"
        )
    tokenizer = Tokenizer(folder, model_vocab_tokens=spec.vocab_tokens, chat_template=chat_template)
    return SwarmModel(
        fingerprint=checkpoint.fingerprint,
        blocks=len(spec.blocks),
        vocab_tokens=spec.vocab_tokens,
        max_model_tokens=max_model_tokens or spec.max_model_tokens,
        eos_token_ids=frozenset(checkpoint.eos_token_ids),
        tokenizer=tokenizer,
    )
