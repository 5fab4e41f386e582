"""The tree of settings: the one place that says what can be chosen, in which unit, within which bounds."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from plait.errors import BadRequest
from plait.units import parse_bytes

ENV_PREFIX = "PLAIT_"
ENV_DELIMITER = "__"


def setting(default: Any, text: str, *, unit: str = "", flag: str = "", **bounds: Any) -> Any:
    """A field of the tree: its sentence, unit, bounds, and the flag that sets it, if it has one."""
    return Field(default, description=text, json_schema_extra={"unit": unit, "flag": flag}, **bounds)


def _read_size(value: object) -> object:
    if not isinstance(value, str | int):
        return value
    try:
        return parse_bytes(value)
    except BadRequest as error:
        raise ValueError(error.message) from error


def _read_swap(value: object) -> object:
    # vLLM's --swap-space is a bare number of GiB, and nobody swaps to less than a kibibyte.
    try:
        number = float(cast(Any, value))
    except (TypeError, ValueError):
        return _read_size(value)
    return int(number * 2**30) if number < 1024 else int(number)


def _check_device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError("choose auto, cpu or cuda (or one GPU, such as cuda:1)")
    return name


def _split_commas(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _check_address(address: str | None) -> str | None:
    if address is None:
        return None
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError("write it as host:port, such as 10.0.0.1:29500")
    return address


def _check_perhaps_listen(address: str | None) -> str | None:
    return None if address is None else _check_listen(address)


def _check_listen(address: str) -> str:
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isascii() and port.isdecimal() and int(port) < 65536):
        raise ValueError("write it as host:port, such as 0.0.0.0:7000; port 0 takes a free one")
    return address


def _check_text(blocks: object) -> object:
    if isinstance(blocks, int):  # YAML reads 16:32 as sixty times sixteen and so on
        raise ValueError("write a span of blocks in quotes, such as '16:32'")
    return blocks


def _check_blocks(blocks: str) -> str:
    span = re.fullmatch(r"(\d{1,4}):(\d{1,4})", blocks)
    if blocks not in ("auto", "none") and (span is None or int(span[1]) >= int(span[2])):
        raise ValueError(
            "write a span of blocks as first:end, such as 0:16 (the end is not in it), auto, or none"
        )
    return blocks


Address = Annotated[str | None, AfterValidator(_check_address)]
Listen = Annotated[str, AfterValidator(_check_listen)]
PerhapsListen = Annotated[str | None, AfterValidator(_check_perhaps_listen)]
Blocks = Annotated[str, BeforeValidator(_check_text), AfterValidator(_check_blocks)]
Device = Annotated[str, AfterValidator(_check_device)]
SwapBytes = Annotated[int, BeforeValidator(_read_swap)]
SizeBytes = Annotated[int, BeforeValidator(_read_size)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_commas)]
Secrets = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split_commas)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(Section):
    """Which model is served, and how it is read."""

    name: str = setting("tiny", "`tiny`, a folder, or a Hugging Face repository id.", flag="--model")
    served_names: Names = setting(
        (),
        "Names that clients may call the model by; the first is the one in answers.",
        flag="--served-model-name",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float", "half", "fp32", "bf16", "fp16"] = (
        setting(
            "auto",
            "Type of the arithmetic; auto is the model's own on a GPU, and on a CPU bfloat16 where plait's kernels run "
            "the model, else float32.",
            flag="--dtype",
        )
    )
    quantization: Literal["none", "int8", "int4", "int4-g128"] = setting(
        "none",
        "How weights are quantized when loaded, on a CPU: int8 has a scale for each output, int4 one for every 32 "
        "inputs of it, int4-g128 for every 128.",
        flag="--quantization",
    )
    packed_cache: bool = setting(
        True,
        "Whether what the CPU kernels make of the weights is kept on the disk, so that later starts are fast; "
        "`plait cache` shows it.",
        flag="--packed-cache",
    )
    max_tokens: int | None = setting(
        None,
        "Longest prompt and answer together; without it the model's limit, lowered to what the cache holds.",
        unit="tokens",
        flag="--max-model-len",
        ge=1,
    )
    chat_template: Path | None = setting(
        None, "A Jinja file used instead of the model's own chat template.", flag="--chat-template"
    )
    offline: bool = setting(False, "Never ask the hub; use what is on this machine.", flag="--offline")


class EngineSettings(Section):
    """The device and its arithmetic."""

    device: Device = setting(
        "auto", "auto, cpu or cuda; auto takes a GPU if torch can use one.", flag="--device"
    )
    threads: int = setting(
        0,
        "CPU threads for tensor work; 0 takes one per core that may be used.",
        unit="threads",
        flag="--threads",
        ge=0,
    )
    seed: int = setting(0, "Seeds requests that bring none.", flag="--seed", ge=0, lt=2**63)
    tensor_parallel_size: int = setting(
        1,
        "Processes over which the model is divided, on a CPU; each has a part of every matrix.",
        unit="processes",
        flag="--tensor-parallel-size",
        ge=1,
        le=64,
    )
    tensor_parallel_rank: int = setting(
        0,
        "Which of them this is: 0 serves, the others take part in its steps.",
        flag="--tensor-parallel-rank",
        ge=0,
        le=63,
    )
    tensor_parallel_address: Address = setting(
        None,
        "Where rank 0 listens for ranks on other machines, as host:port; without it all are started on this one. Ranks "
        "are not asked who they are: for a network that only they can reach.",
        flag="--tensor-parallel-address",
    )
    tensor_parallel_timeout_s: float = setting(
        30.0,
        "How long a rank may keep the others waiting before it counts as lost.",
        unit="seconds",
        gt=0,
        le=86400,
    )


class KvCacheSettings(Section):
    """The paged cache of keys and values."""

    memory: SizeBytes | None = setting(
        None,
        "Memory of the cache, such as 2GiB; without it a part of what the weights leave free.",
        unit="bytes",
        flag="--kv-cache-memory",
        ge=1,
    )
    dtype: Literal["auto", "bfloat16", "int8"] = setting(
        "auto",
        "Type of the keys and values; auto is that of the arithmetic, int8 is for CPUs and takes half of bfloat16.",
        flag="--kv-cache-dtype",
    )
    gpu_memory_fraction: float = setting(
        0.9,
        "Part of a GPU's memory that weights, cache and activations may take together.",
        unit="fraction",
        flag="--gpu-memory-utilization",
        gt=0,
        le=1,
    )
    block_tokens: int = setting(
        16, "Tokens in one KV block.", unit="tokens", flag="--block-size", ge=1, le=1024
    )
    prefix_caching: bool = setting(
        True, "Whether requests share the blocks of equal prefixes.", flag="--enable-prefix-caching"
    )
    swap: SwapBytes = setting(
        0,
        "Host memory for preempted sequences, such as 4GiB (a bare number below 1024 is GiB, as for vLLM); "
        "0 means they are always computed again.",
        unit="bytes",
        flag="--swap-space",
        ge=0,
    )


class SchedulingSettings(Section):
    """Which tokens run in the next forward pass."""

    policy: Literal["static", "orca", "paged"] = setting(
        "paged",
        "static: whole batches run to their end; orca: iterations, slots reserved at full length; "
        "paged: iterations, blocks on demand.",
        flag="--policy",
    )
    preemption: Literal["recompute", "swap", "auto"] = setting(
        "auto",
        "How a sequence gives up its blocks: recomputed later, or moved to host memory (needs kvcache.swap); "
        "auto takes the cheaper one.",
        flag="--preemption",
    )
    max_running_sequences: int = setting(
        256, "Most sequences in one step.", unit="sequences", flag="--max-num-seqs", ge=1, le=65536
    )
    step_tokens: int = setting(
        2048, "Most tokens in one step.", unit="tokens", flag="--max-num-batched-tokens", ge=1, le=2**20
    )
    max_waiting: int = setting(
        1024,
        "Most requests that wait; one more is refused with 429.",
        unit="requests",
        flag="--max-waiting",
        ge=1,
    )
    long_prefill_tokens: int | None = setting(
        None, "Most tokens of one prompt in one step; without it the step's budget.", unit="tokens", ge=1
    )
    watermark_fraction: float = setting(
        0.01, "Part of the blocks kept free when a request is admitted.", unit="fraction", ge=0, lt=1
    )


class ServerSettings(Section):
    """The HTTP front door."""

    host: str = setting("127.0.0.1", "Address to listen on.", flag="--host", min_length=1)
    port: int = setting(8000, "Port to listen on; 0 takes a free one.", flag="--port", ge=0, le=65535)
    api_keys: Secrets = setting(
        (), "Keys that clients must present, beside those of `plait token`.", flag="--api-key"
    )
    insecure_no_auth: bool = setting(
        False, "Listen on an address that others can reach without any key.", flag="--insecure-no-auth"
    )
    tool_format: str = setting(
        "auto",
        "How tool calls are written in the model's text; auto reads it off the chat template.",
        flag="--tool-format",
    )
    swarm: bool = setting(
        False,
        "Serve as the first machine of a swarm, or as one more gateway of it: others join with the ticket it prints.",
        flag="--swarm",
    )
    drain_timeout_s: float = setting(
        30.0,
        "After SIGTERM or Ctrl-C, how long running requests may go on.",
        unit="seconds",
        flag="--drain-timeout",
        ge=0,
        le=86400,
    )


class SwarmSettings(Section):
    """One machine of a swarm: what it serves, how others reach it, and which machines answer a request."""

    ticket: SecretStr | None = setting(
        None,
        "For `plait serve --swarm`: be one more gateway of this ticket's swarm, for the same model; without it the "
        "swarm is this user's own.",
        flag="--ticket",
    )
    name: str = setting(
        "", "What people see this machine called; without it its host's name.", flag="--name", max_length=64
    )
    listen: Listen = setting(
        "127.0.0.1:0",
        "Where other machines of the swarm connect, as host:port; 0.0.0.0:7000 lets those of the network in.",
        flag="--swarm-listen",
    )
    advertise: Names = setting(
        (),
        "Addresses, as host:port, that others are told to dial; without any those of --swarm-listen.",
        flag="--swarm-advertise",
    )
    iroh_listen: PerhapsListen = setting(
        None,
        "Where machines also connect by iroh (QUIC), such as 0.0.0.0:0; it needs `pip install 'plait[iroh]'`.",
        flag="--iroh-listen",
    )
    iroh_relay: str | None = setting(
        None,
        "URL of the iroh relay by which machines find each other through address translation; without it none is used.",
        flag="--iroh-relay",
        pattern=r"^https?://\S+$",
        max_length=128,
    )
    blocks: Blocks = setting(
        "auto",
        "The span of blocks that this machine serves, such as 0:16; auto takes what the swarm lacks most, none only "
        "passes requests on.",
        flag="--blocks",
    )
    memory: SizeBytes | None = setting(
        None,
        "Memory for weights and cache together, such as 4GB: how many blocks fit; without it most of what is free.",
        unit="bytes",
        flag="--memory",
        ge=1,
    )
    context_tokens: int = setting(
        16384,
        "Tokens of context, over all sessions, for which memory is kept when blocks are chosen.",
        unit="tokens",
        ge=256,
        le=2**30,
    )
    weights: Literal["auto", "cache", "peers", "hub"] = setting(
        "auto",
        "Where weights come from that are not on this machine: auto asks peers for those of the span, then the hub "
        "for the model; cache takes only what is here.",
        flag="--weights",
    )
    wire_format: Literal["float32", "bfloat16", "int8"] = setting(
        "float32",
        "How hidden states travel: float32 is exact, bfloat16 takes half of its bytes, int8 about a quarter.",
        flag="--wire-format",
    )
    route_mode: Literal["latency", "throughput", "exact", "tradeoff", "load", "pinned"] = setting(
        "load",
        "How the machines of a request are chosen; a request may say otherwise in its field `route`.",
        flag="--route-mode",
    )
    route_pick: str = setting(
        "balanced",
        "Which point of their front the modes exact and tradeoff take: balanced, latency-first, throughput-first, "
        "sampled, budget=SECONDS or weights=A,B.",
        flag="--route-pick",
        max_length=64,
    )
    draft_tokens: int = setting(
        0,
        "Most tokens guessed ahead (from what the text repeats) and verified in one round through the machines; 0 is "
        "off.",
        unit="tokens",
        flag="--draft-tokens",
        ge=0,
        le=32,
    )
    ticket_s: float = setting(
        7 * 86400.0, "How long a printed ticket lets others join.", unit="seconds", gt=0, le=10 * 365 * 86400
    )
    announce_s: float = setting(
        5.0, "How often this machine says how it is.", unit="seconds", ge=0.05, le=300
    )
    rebalance: bool = setting(
        True,
        "Whether this machine moves to other blocks when that makes the swarm faster.",
        flag="--rebalance",
    )
    rebalance_s: float = setting(60.0, "Mean time between two looks at that.", unit="seconds", gt=0, le=86400)
    balance_quality: float = setting(
        0.75,
        "It moves only if the slowest block's throughput is less than this part of what it then would be.",
        unit="fraction",
        gt=0,
        le=1,
    )
    price_per_hour: float = setting(
        0.0, "What this machine costs, in any currency that the swarm agrees on; 0 is unknown.", ge=0
    )
    busy_watts: float = setting(0.0, "Power it draws while it computes; 0 is unknown.", unit="watts", ge=0)
    folder: Path | None = setting(
        None, "Where keys of machines and swarms are kept; without it `plait/swarm` in XDG_CONFIG_HOME."
    )


class LendingSettings(Section):
    """KV memory that machines of a swarm lend each other, if they serve the same blocks in the same formats."""

    policy: Literal["off", "pull", "plan"] = setting(
        "off",
        "off: every machine keeps to its own memory; pull: who is short of it asks for some; plan: besides, one has "
        "blocks moved where that serves more.",
        flag="--lending",
    )
    lend_fraction: float = setting(
        0.5, "Most of this machine's KV blocks that are lent at once.", unit="fraction", ge=0, le=1
    )
    keep_free_fraction: float = setting(
        0.05, "Part of its KV blocks that stays free for its own sessions.", unit="fraction", ge=0, le=1
    )
    borrow_tokens: int = setting(
        8192,
        "Most context that this machine borrows memory for: how much longer than its own cache a session may become.",
        unit="tokens",
        flag="--borrow-tokens",
        ge=0,
        le=2**18,
    )
    moved_tokens_per_step: int = setting(
        16,
        "Tokens whose memory may move beside a step in which sessions decode; 0 moves none then.",
        unit="tokens",
        ge=0,
        le=4096,
    )
    lease_s: float = setting(
        5.0,
        "How long a borrower may be silent before what it has borrowed is free again.",
        unit="seconds",
        gt=0,
        le=3600,
    )
    recall_s: float = setting(
        5.0, "How long a borrower has to return what is called back.", unit="seconds", gt=0, le=3600
    )
    heartbeat_s: float = setting(
        0.5, "How often machines tell each other what is lent.", unit="seconds", ge=0.05, le=60
    )
    deadline_s: float = setting(
        5.0,
        "How long a lender may take to answer within a step; then what it holds is computed again.",
        unit="seconds",
        gt=0,
        le=600,
    )
    wait_s: float = setting(
        60.0,
        "How long a session may stand still for memory that nobody lends, before it ends with an error.",
        unit="seconds",
        gt=0,
        le=86400,
    )
    small_batch: int = setting(
        8,
        "For plan: a machine that runs fewer sessions than this while others wait should move memory out.",
        unit="sessions",
        ge=1,
        le=4096,
    )


class LogSettings(Section):
    """What is said on standard error."""

    level: Literal["debug", "info", "warning", "error"] = setting(
        "info", "Least important line that is shown; debug also shows tracebacks.", flag="--log-level"
    )


class Settings(BaseSettings):
    """Everything a user may choose; frozen, unknown keys forbidden."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=ENV_DELIMITER,
    )

    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    kvcache: KvCacheSettings = KvCacheSettings()
    scheduling: SchedulingSettings = SchedulingSettings()
    server: ServerSettings = ServerSettings()
    swarm: SwarmSettings = SwarmSettings()
    lending: LendingSettings = LendingSettings()
    log: LogSettings = LogSettings()


SECTIONS: tuple[str, ...] = tuple(Settings.model_fields)


@dataclass(frozen=True, slots=True)
class SettingFacts:
    """One leaf of the tree, for flags, errors and documentation.

    `kind` is how its type reads: `text`, `integer`, `size`, `a|b|c`. A list takes its values apart by commas.
    """

    section: str
    field: str
    text: str
    unit: str
    flag: str
    default: object
    kind: str
    bounds: str
    is_switch: bool
    is_list: bool

    @property
    def path(self) -> str:
        return f"{self.section}.{self.field}"

    @property
    def variable(self) -> str:
        return f"{ENV_PREFIX}{self.section}{ENV_DELIMITER}{self.field}".upper()


@cache
def setting_facts() -> tuple[SettingFacts, ...]:
    """Every leaf of the tree, in order."""
    return tuple(
        _facts(section, name, field)
        for section, section_field in Settings.model_fields.items()
        for name, field in cast(type[Section], section_field.annotation).model_fields.items()
    )


def _facts(section: str, name: str, field: FieldInfo) -> SettingFacts:
    extra = cast(dict[str, str], field.json_schema_extra)
    kind = _kind(field, is_size=extra["unit"] == "bytes")
    return SettingFacts(
        section=section,
        field=name,
        text=field.description or "",
        unit=extra["unit"],
        flag=extra["flag"],
        default=field.default,
        kind=kind,
        bounds=_bounds(field),
        is_switch=kind == "switch",
        is_list=kind == "list",
    )


_KINDS: dict[object, str] = {
    bool: "switch",
    int: "integer",
    float: "number",
    Path: "file",
    str: "text",
    SecretStr: "text",
}


def _kind(field: FieldInfo, *, is_size: bool) -> str:
    annotation: Any = field.annotation
    if is_size:
        return "size"
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    if get_origin(annotation) is tuple:
        return "list"
    # Optional: the kind is that of what it is when it is given.
    given = [part for part in get_args(annotation) if part is not type(None)]
    return _KINDS[given[0] if given else annotation]


def _bounds(field: FieldInfo) -> str:
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    said = [
        f"{word} {getattr(rule, sign)}"
        for rule in field.metadata
        for sign, word in signs.items()
        if hasattr(rule, sign)
    ]
    return ", ".join(said)
