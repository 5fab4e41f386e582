"""Conversations of tenants: prompts that hold their history, with instructions and documents that many share."""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from plait.errors import BadSetup
from plait.workload.arrivals import gamma_arrivals_s
from plait.workload.lengths import LengthDistribution
from plait.workload.prefixes import PromptBlocks, zipf_weights
from plait.workload.traces import TraceRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationMix:
    """Who talks, about what, and for how long.

    Conversations belong to tenants, whose popularity is Zipf's; a tenant's conversations begin with the same
    instructions. A conversation has a geometric number of turns, and with probability `document_fraction` the first
    question brings one of the tenant's documents. A turn comes `think_s` (exponential) after the answer before it,
    which is taken to come at `output_tokens_per_s`.
    """

    question: LengthDistribution
    answer: LengthDistribution
    tenants: int = 1
    tenant_exponent: float = 1.0
    instruction_tokens: int = 0
    mean_turns: float = 1.0
    think_s: float = 30.0
    output_tokens_per_s: float = 20.0
    documents: int = 0
    document_exponent: float = 1.0
    document_tokens: int = 0
    document_fraction: float = 0.0
    most_total_tokens: int = 2**31

    def __post_init__(self) -> None:
        if self.tenants < 1 or self.mean_turns < 1 or self.think_s < 0 or self.output_tokens_per_s <= 0:
            raise BadSetup("conversations need a tenant, at least one turn, and times that are not negative")
        if min(self.instruction_tokens, self.document_tokens, self.documents) < 0:
            raise BadSetup("lengths of instructions and documents are not negative")
        if not 0 <= self.document_fraction <= 1 or (self.document_fraction and not self.documents):
            raise BadSetup(
                "documents are brought by a fraction of the conversations, from a pool that is not empty"
            )


def synthesize_conversations(
    count: int, rate_per_s: float, variation: float, mix: ConversationMix, rng: Generator
) -> tuple[TraceRequest, ...]:
    """The requests of `count` conversations that begin at `rate_per_s` (gamma gaps), in order of arrival.

    A conversation ends early where its next turn would be longer than `mix.most_total_tokens`.
    """
    begins_s = gamma_arrivals_s(count, rate_per_s, variation, rng)
    tenants = rng.choice(mix.tenants, size=count, p=zipf_weights(mix.tenants, mix.tenant_exponent))
    turns = rng.geometric(1 / mix.mean_turns, size=count)
    popularity = zipf_weights(mix.documents, mix.document_exponent) if mix.documents else np.ones(1)
    brings = rng.random(count) < mix.document_fraction
    documents = rng.choice(len(popularity), size=count, p=popularity)
    blocks = PromptBlocks()
    result: list[TraceRequest] = []
    fresh = mix.tenants * (
        1 + mix.documents
    )  # identities of pieces: instructions, documents, then all that is said
    for number in range(count):
        tenant = int(tenants[number])
        pieces = [(tenant, mix.instruction_tokens)]
        if brings[number]:
            pieces.append(
                (mix.tenants + tenant * mix.documents + int(documents[number]), mix.document_tokens)
            )
        at_s = float(begins_s[number])
        questions = mix.question.draw(int(turns[number]), rng)
        answers = mix.answer.draw(int(turns[number]), rng)
        for turn, (question, answer) in enumerate(zip(questions.tolist(), answers.tolist(), strict=True)):
            question, answer = max(1, question), max(1, answer)
            pieces.append((fresh, question))
            prompt_tokens = sum(tokens for _, tokens in pieces)
            if prompt_tokens + answer > mix.most_total_tokens:
                break
            result.append(
                TraceRequest(
                    arrival_s=at_s,
                    prompt_tokens=prompt_tokens,
                    output_tokens=answer,
                    conversation=f"c{number}",
                    turn=turn,
                    tenant=f"t{tenant}",
                    prompt_blocks=blocks.of(pieces),
                )
            )
            pieces.append((fresh + 1, answer))
            fresh += 2
            at_s += answer / mix.output_tokens_per_s + float(rng.exponential(mix.think_s))
    return tuple(sorted(result, key=lambda request: request.arrival_s))
