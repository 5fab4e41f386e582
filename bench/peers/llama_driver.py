"""llama.cpp as `driver.py` wants it, through the C interface that llama-cpp-python exposes.

A prompt is computed in batches of 2,048 tokens, before any sequence decodes. A prompt equal to the first one is not
computed again: its keys and values are copied, each sequence keeping its own, so that a long context can be filled in
reasonable time.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp
from driver import drive

BATCH_TOKENS = 2048


class LlamaEngine:
    """Settings: gguf, threads, sequences, context_tokens (of each), kv_type (f16 or q8_0), flash_attention (0 or 1)."""

    def __init__(self, settings: dict[str, Any]) -> None:
        llama_cpp.llama_backend_init()
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        model_parameters = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(settings["gguf"].encode(), model_parameters)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = settings["context_tokens"] * settings["sequences"]
        parameters.n_seq_max = settings["sequences"]
        parameters.kv_unified = False
        parameters.n_batch, parameters.n_ubatch = BATCH_TOKENS, 512
        parameters.n_threads = parameters.n_threads_batch = settings["threads"]
        parameters.flash_attn_type = settings["flash_attention"]
        kv_type = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}[settings["kv_type"]]
        parameters.type_k = parameters.type_v = kv_type
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise SystemExit(f"llama.cpp refused {settings}")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        self._greedy = llama_cpp.llama_sampler_init_greedy()
        self._waiting: list[tuple[int, list[int]]] = []
        self._last: dict[int, tuple[int, int]] = {}  # sequence: its latest token and that token's position
        self._left: dict[int, int] = {}
        self._first_prompt: list[int] = []

    def facts(self) -> dict[str, Any]:
        return {
            "version": f"llama-cpp-python {llama_cpp.__version__}",
            "system": llama_cpp.llama_print_system_info().decode(),
            "model_bytes": llama_cpp.llama_model_size(self._model),
        }

    def add(self, request: int, prompt: Sequence[int], output_tokens: int) -> None:
        self._waiting.append((request, list(prompt)))
        self._left[request] = output_tokens

    def step(self) -> Sequence[int]:
        if self._waiting:
            came = [self._compute_prompt(*self._waiting.pop(0))]
        else:
            came = list(self._last)
            rows = [(token, position, sequence) for sequence, (token, position) in self._last.items()]
            for sequence, token in zip(came, self._decode(rows, range(len(rows))), strict=True):
                self._last[sequence] = (token, self._last[sequence][1] + 1)
        for sequence in came:
            self._left[sequence] -= 1
            if not self._left[sequence]:
                del self._left[sequence], self._last[sequence]
                llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        return came

    def _compute_prompt(self, sequence: int, prompt: list[int]) -> int:
        if 0 in self._last and prompt == self._first_prompt:
            llama_cpp.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)
            llama_cpp.llama_memory_seq_rm(self._memory, sequence, len(prompt) - 1, -1)
            rows = [(prompt[-1], len(prompt) - 1, sequence)]
            (token,) = self._decode(rows, [0])
        else:
            for begin in range(0, len(prompt), BATCH_TOKENS):
                piece = prompt[begin : begin + BATCH_TOKENS]
                rows = [(token, begin + i, sequence) for i, token in enumerate(piece)]
                is_last = begin + len(piece) == len(prompt)
                tokens = self._decode(rows, [len(piece) - 1] if is_last else [])
            (token,) = tokens
            if sequence == 0:
                self._first_prompt = prompt
        self._last[sequence] = (token, len(prompt))
        return sequence

    def _decode(self, rows: Sequence[tuple[int, int, int]], wanted: Sequence[int]) -> list[int]:
        """Compute (token, position, sequence) rows; returns the best next token of the `wanted` ones."""
        batch = self._batch
        for index, (token, position, sequence) in enumerate(rows):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = 0
        for index in wanted:
            batch.logits[index] = 1
        batch.n_tokens = len(rows)
        code = llama_cpp.llama_decode(self._context, batch)
        if code:
            raise SystemExit(f"llama_decode returned {code}")
        return [llama_cpp.llama_sampler_sample(self._greedy, self._context, index) for index in wanted]

    def has_work(self) -> bool:
        return bool(self._left)

    def forget(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, True)
        self._waiting.clear()
        self._last.clear()
        self._left.clear()

    def kernel_s(self) -> float | None:
        return None


if __name__ == "__main__":
    drive(LlamaEngine)
