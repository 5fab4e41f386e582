"""PETALS' client behind lines of JSON, in PETALS' environment: a prompt is a session in a thread of its own.

The argument is {"model": folder, "prefix": name of the swarm, "initial_peers": [...], "threads": n, "replays": bool}.
The first line out says versions. Then each line in is answered by one line:

    {"prompts": [[token id, ...], ...], "output_tokens": n}    greedy, and always n tokens
    {..., "tell_at": k}              says {"told_at": k, "peers": [...]} before the answer, when the first prompt has k
                                     tokens: the servers that it crosses
    {..., "max_retries": n}          a prompt fails after so many failures in a row
    -> {"token_ids": [[...], ...], "unix_s": [[...], ...], "errors": ["", ...]}

    {"servers": true}                -> {"peers": [...]}, those that the client knows to serve

`"replays": true` repairs what keeps the released client from going on after a lost server; see `_then_replay`.
"""

import json
import os
import sys
import threading
import time
import uuid
from importlib.metadata import version
from typing import Any

from petals_hivemind import restore_names

restore_names()

import torch  # noqa: E402
from petals import AutoDistributedModelForCausalLM  # noqa: E402
from petals.client.inference_session import InferenceSession  # noqa: E402
from petals.utils.misc import DUMMY, DUMMY_INT64  # noqa: E402
from transformers import StoppingCriteria, StoppingCriteriaList  # noqa: E402


class _Arrivals(StoppingCriteria):
    """Called with each token; never stops."""

    def __init__(self, on_token: Any) -> None:
        self.unix_s: list[float] = []
        self._on_token = on_token

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self.unix_s.append(time.time())
        self._on_token(len(self.unix_s))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Client:
    def __init__(self, settings: dict[str, Any], say: Any) -> None:
        torch.set_num_threads(settings["threads"])
        if settings["replays"]:
            InferenceSession._update_sequence = _then_replay(InferenceSession._update_sequence)
        self._say = say
        self._model = AutoDistributedModelForCausalLM.from_pretrained(
            settings["model"],
            initial_peers=settings["initial_peers"],
            dht_prefix=settings["prefix"],
            torch_dtype=torch.bfloat16,
            update_period=5,
            show_route=False,
        )
        self._servers = self._model.transformer.h.sequence_manager

    def serving(self) -> list[str]:
        self._servers._update()
        found = self._servers.state.sequence_info.spans_by_priority
        return sorted({str(span.peer_id) for span in found})

    def run(self, command: dict[str, Any]) -> dict[str, Any]:
        self._servers.config.max_retries = command.get("max_retries")
        results: list[dict[str, Any]] = [{} for _ in command["prompts"]]

        def ask(index: int) -> None:
            tell_at = command.get("tell_at") if index == 0 else None
            results[index] = self._ask(command["prompts"][index], command["output_tokens"], tell_at)

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(results))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {
            "token_ids": [result["token_ids"] for result in results],
            "unix_s": [result["unix_s"] for result in results],
            "errors": [result["error"] for result in results],
        }

    def _ask(self, prompt: list[int], output_tokens: int, tell_at: int | None) -> dict[str, Any]:
        tokens = torch.tensor([prompt])
        error, token_ids = "", []
        with (
            torch.inference_mode(),
            self._model.inference_session(max_length=len(prompt) + output_tokens) as session,
        ):

            def on_token(count: int) -> None:
                if count == tell_at:
                    peers = [str(stage.span.peer_id) for stage in session._server_sessions]
                    self._say({"told_at": count, "peers": peers})

            arrivals = _Arrivals(on_token)
            try:
                out = self._model.generate(
                    tokens,
                    max_new_tokens=output_tokens,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                    session=session,
                    stopping_criteria=StoppingCriteriaList([arrivals]),
                )
                token_ids = out[0, len(prompt) :].tolist()
            except Exception as failure:  # the answer ends here; the bench reports why
                error = repr(failure)
        return {"token_ids": token_ids, "unix_s": arrivals.unix_s, "error": error}


def _then_replay(update_sequence: Any) -> Any:
    """Bring replacements of a lost stage to the session's position, by the inputs kept of that stage.

    This is what PETALS' paper describes. The released client (2.2.0, and main of August 2024) starts a replacement at
    position 0, then asserts that it is at the session's, and so never goes on after a loss.
    """

    def update_and_replay(session: Any, server_index: int, block_index: int, attempt: int) -> None:
        stages_before = len(session._server_sessions)
        update_sequence(session, server_index, block_index, attempt)
        if session.position == 0:
            return
        replaced = len(session._server_sessions) - stages_before + 1
        inputs = session._server_sessions[server_index].history[:, : session.position]
        for stage in session._server_sessions[server_index : server_index + replaced]:
            stage.history = None
            inputs = stage.step(inputs, DUMMY, DUMMY_INT64, step_id=str(uuid.uuid4()))

    return update_and_replay


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=answers, flush=True)

    client = Client(json.loads(sys.argv[1]), say)
    say({name: version(name) for name in ("petals", "hivemind", "transformers", "torch")})
    for line in sys.stdin:
        command = json.loads(line)
        say({"peers": client.serving()} if command.get("servers") else client.run(command))


if __name__ == "__main__":
    main()
    os._exit(0)  # its threads would keep the process
