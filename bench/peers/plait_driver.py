"""plait's engine as `driver.py` wants it: in process, without HTTP."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from driver import drive

from plait.engine import EngineOptions, load_engine
from plait.ids import RequestId
from plait.session import GenerationRequest, SamplingParams


class PlaitEngine:
    """Settings are those of `EngineOptions`. No prefix is shared: every prompt is computed."""

    def __init__(self, settings: dict[str, Any]) -> None:
        options = EngineOptions(prefix_caching=False, **settings | {"folder": Path(settings["folder"])})
        self._engine = load_engine(options)
        self._options = options
        self._numbers: dict[RequestId, int] = {}
        self._added = 0

    def facts(self) -> dict[str, Any]:
        from plait.kernels import current_isa, native_available

        decoder = self._engine._decoder
        weights = getattr(decoder, "_weights", None)
        matrices = getattr(weights, "matrices", {})
        return {
            "isa": current_isa() if native_available else "",
            "decoder": type(decoder).__name__,
            "packed_bytes": sum(matrix.bytes for matrix in matrices.values()),
            "embedding_bytes": sum(m.bytes for (_, slot, _), m in matrices.items() if slot == "embedding"),
            "kv_pool_bytes": self._options.kv_cache_bytes,
        }

    def add(self, request: int, prompt: Sequence[int], output_tokens: int) -> None:
        self._added += 1
        id = RequestId(str(self._added))
        sampling = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
        self._engine.add(GenerationRequest(id=id, prompt_token_ids=tuple(prompt), sampling=sampling))
        self._numbers[id] = request

    def step(self) -> Sequence[int]:
        return [
            self._numbers[delta.request_id]
            for delta in self._engine.step()
            for sequence in delta.sequences
            for _ in sequence.token_ids
        ]

    def has_work(self) -> bool:
        return self._engine.has_work

    def forget(self) -> None:
        for id in self._numbers:
            self._engine.abort(id)
        self._numbers.clear()

    def kernel_s(self) -> float | None:
        return getattr(self._engine._decoder, "kernel_s", None)


if __name__ == "__main__":
    drive(PlaitEngine)
