"""`plait generate`: continue a prompt offline, without a server."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli.flags import ENGINE_SECTIONS, with_settings
from plait.cli.terminal import JsonFlag, bytes_bar, print_json, say
from plait.errors import BadSetup
from plait.settings import Settings

if TYPE_CHECKING:
    from plait.session import SamplingParams

STDIN = "-"


@with_settings(sections=ENGINE_SECTIONS, quiet=True)
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts; - reads one from standard input.", show_default=False)
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
    n: Annotated[int, typer.Option("--n", "-n", help="Continuations of each prompt.")] = 1,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Keep the likeliest tokens of this mass.")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Keep this many tokens; 0 keeps all.")] = 0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Longest continuation.")] = 128,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Stop before this text.")] = None,
    json: JsonFlag = False,
    *,
    settings: Settings,
) -> None:
    """Continue prompts with a model, here and now.

    The same --seed gives the same text.
    """
    if not prompts:
        raise BadSetup(
            'no prompt is given; for example: plait generate tiny "Once upon a time", or - for standard input'
        )
    from plait.session import SamplingParams

    texts = [sys.stdin.read() if prompt == STDIN else prompt for prompt in prompts]
    # Checked before a model is loaded for it.
    params = SamplingParams(
        n=n, temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=max_tokens, stop=stop or None
    )
    outputs = _run(settings, texts, params, chat=chat)
    if json:
        print_json(outputs)
        return
    for output in outputs:
        for number, choice in enumerate(output["outputs"]):
            if len(outputs) * n > 1:
                say(f"--- {output['prompt']!r}, {number + 1} of {n}")
            say(choice["text"])


def _run(
    settings: Settings, texts: Sequence[str], params: "SamplingParams", *, chat: bool
) -> list[dict[str, Any]]:
    from plait.cli.options import engine_options
    from plait.worker import LLM

    with bytes_bar() as show:
        options = engine_options(
            settings, on_download=lambda done, total: show(settings.model.name, done, total)
        )
    # A script waits for all its prompts: none is refused.
    options = replace(
        options, limits=replace(options.limits, max_waiting=max(options.limits.max_waiting, len(texts)))
    )
    with LLM.from_options(options) as llm:
        if chat:
            answers = [llm.chat([{"role": "user", "content": text}], params) for text in texts]
        else:
            answers = llm.generate(list(texts), params)
    return [
        {
            "prompt": text,
            "prompt_tokens": len(answer.prompt_token_ids),
            "outputs": [
                {
                    "text": choice.text,
                    "token_ids": list(choice.token_ids),
                    "finish_reason": choice.finish_reason,
                }
                for choice in answer.outputs
            ],
        }
        for text, answer in zip(texts, answers, strict=True)
    ]
