"""`plait doctor`: what this machine can do, and why not."""

import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from plait import __version__
from plait.cli.flags import with_settings
from plait.cli.keys import default_key_store
from plait.cli.machine import Machine, free_disk_bytes, this_machine
from plait.cli.serving import listen
from plait.cli.terminal import JsonFlag, print_json, say
from plait.errors import BadSetup
from plait.settings import Settings
from plait.units import format_bytes

OLDEST_PYTHON = (3, 11)
# A model of this many billions of parameters is the smallest that people call useful, in bfloat16.
ROOMY_DISK_BYTES = 8 * 2**30
# Weights take this part of free memory; the KV cache and activations need the rest.
WEIGHT_FRACTION = 0.75
BYTES_PER_PARAMETER = {"float32": 4, "bfloat16": 2}
HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `advice` says what would change it."""

    topic: str
    state: Literal["good", "limited", "bad"]
    fact: str
    advice: str = ""


@with_settings(model=False, sections=("engine", "server", "log"))
def doctor(
    network: Annotated[
        bool, typer.Option("--network", help="Also ask whether the hub can be reached.")
    ] = False,
    json: JsonFlag = False,
    *,
    settings: Settings,
) -> None:
    """Say what this machine can do, and why not. Exits with 1 if it cannot serve at all."""
    machine = this_machine()
    findings: list[Finding] = []
    for finding in _findings(machine, settings, network=network):
        findings.append(finding)
        if not json:
            _print(finding)
    fits = _largest_models(machine)
    if json:
        print_json(
            {
                "version": __version__,
                "can_serve": all(finding.state != "bad" for finding in findings),
                "findings": [asdict(finding) for finding in findings],
                "largest_model_parameters": fits,
                "machine": asdict(machine),
            }
        )
    if any(finding.state == "bad" for finding in findings):
        raise typer.Exit(1)


def _print(finding: Finding) -> None:
    mark = {"good": "ok     ", "limited": "limited", "bad": "BAD    "}[finding.state]
    say(f"{mark}  {finding.topic:<10} {finding.fact}")
    if finding.advice:
        say(f"{'':<9}{'':<11}-> {finding.advice}")


def _findings(machine: Machine, settings: Settings, *, network: bool) -> Iterator[Finding]:
    yield _python()
    yield from _packages()
    yield from _device(settings.engine.device)
    yield _cores(machine)
    yield _instructions(machine)
    yield _memory(machine)
    fits = _largest_models(machine)
    said = ", ".join(f"{parameters / 1e9:.1f} billion in {dtype}" for dtype, parameters in fits.items())
    yield Finding("model size", "good", f"up to about {said} parameters on the CPU")
    yield _cache()
    yield _port(settings)
    yield _keys(settings)
    if network:
        yield _hub()


def _python() -> Finding:
    state = "good" if sys.version_info >= OLDEST_PYTHON else "bad"
    advice = "" if state == "good" else f"use Python {'.'.join(map(str, OLDEST_PYTHON))} or newer"
    return Finding("python", state, f"{platform.python_version()} on {machine_name()}", advice)


def machine_name() -> str:
    return f"{platform.system()} {platform.machine()}"


def _packages() -> Iterator[Finding]:
    from importlib.metadata import PackageNotFoundError, version

    for package in ("torch", "tokenizers", "safetensors", "fastapi"):
        try:
            found = version(package)
        except PackageNotFoundError:
            yield Finding(package, "bad", "not installed", "install plait with its dependencies: make run")
            continue
        if package == "torch":
            yield Finding(package, "good", found)


def _device(asked: str) -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("device", "bad", f"torch cannot be imported: {error}", "install plait again: make run")
        return
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free_bytes, total_bytes = torch.cuda.mem_get_info(number)
            name = torch.cuda.get_device_name(number)
            fact = f"cuda:{number} is {name}, {format_bytes(free_bytes)} free of {format_bytes(total_bytes)}"
            yield Finding("device", "good", fact)
        return
    if torch.version.cuda is None:
        reason, advice = "this build of torch has no CUDA", "for an NVIDIA GPU, install a CUDA build of torch"
    else:
        reason, advice = "torch sees no CUDA device", "check nvidia-smi and CUDA_VISIBLE_DEVICES"
    wanted = asked.startswith("cuda")
    yield Finding("device", "bad" if wanted else "good", f"cpu ({reason})", advice)


def _cores(machine: Machine) -> Finding:
    if machine.core_limit is None:
        return Finding("cores", "good", f"{machine.cores}, {machine.processor}")
    return Finding(
        "cores",
        "limited",
        f"{machine.usable_cores} of {machine.cores} may be used, {machine.processor}",
        f"{machine.core_limit} holds this process back",
    )


def _instructions(machine: Machine) -> Finding:
    if not machine.isa:
        return Finding("vectors", "limited", "no vector instructions known here", "expect plain speed")
    widest = any(name.startswith(("avx512", "amx", "neon-bf16")) for name in machine.isa)
    advice = "" if widest else "a CPU with AVX-512 or AMX computes prompts several times faster"
    return Finding("vectors", "good" if widest else "limited", ", ".join(machine.isa), advice)


def _memory(machine: Machine) -> Finding:
    if not machine.memory_bytes:
        return Finding("memory", "limited", "not known on this system", "give --kv-cache-memory")
    fact = f"{format_bytes(machine.free_memory_bytes)} free of {format_bytes(machine.memory_bytes)}"
    limit_bytes = machine.memory_limit_bytes
    if limit_bytes is not None and limit_bytes < machine.memory_bytes:
        return Finding("memory", "limited", fact, f"a control group limits it to {format_bytes(limit_bytes)}")
    return Finding("memory", "good", fact)


def _largest_models(machine: Machine) -> dict[str, int]:
    """Parameters of the largest model whose weights fit, by dtype."""
    room_bytes = WEIGHT_FRACTION * machine.free_memory_bytes
    return {dtype: int(room_bytes / each_bytes) for dtype, each_bytes in BYTES_PER_PARAMETER.items()}


def _cache() -> Finding:
    from huggingface_hub import is_offline_mode
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    free_bytes = free_disk_bytes(folder)
    fact = f"{folder}, {format_bytes(free_bytes)} free" + (", offline mode" if is_offline_mode() else "")
    if free_bytes < ROOMY_DISK_BYTES:
        return Finding("cache", "limited", fact, "little room for downloads; point HF_HOME at a larger disk")
    return Finding("cache", "good", fact)


def _port(settings: Settings) -> Finding:
    host, port = settings.server.host, settings.server.port
    try:
        listen(host, port).socket.close()
    except BadSetup as error:
        return Finding("port", "limited", f"{host}:{port} is not free", error.message)
    return Finding("port", "good", f"{host}:{port} is free")


def _keys(settings: Settings) -> Finding:
    try:
        keys = default_key_store().load()
    except BadSetup as error:
        return Finding("API keys", "bad", "cannot be read", error.message)
    count = len(keys) + len(settings.server.api_keys)
    if count:
        return Finding("API keys", "good", f"{count}: clients must present one")
    return Finding("API keys", "good", "none: only this machine may connect", "'plait token new' creates one")


def _hub() -> Finding:
    import httpx
    from huggingface_hub.constants import ENDPOINT

    try:
        status = httpx.head(ENDPOINT, timeout=HUB_TIMEOUT_S, follow_redirects=True).status_code
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        return Finding("hub", "limited", f"{ENDPOINT} cannot be reached: {reason}", "models here still serve")
    return Finding("hub", "good", f"{ENDPOINT} answers (HTTP {status})")
