"""What is asked of a server: when requests arrive, how long they are, and traces of both.

arrivals.py       arrival times: Poisson, gamma bursts, bursts and silence, days, constant, all at once
lengths.py        prompt and output lengths: named mixes and the distributions they are made of
prefixes.py       prompts that begin alike, as numbered blocks; what a cache could save
conversations.py  tenants, turns and documents
traces.py         a sequence of requests, synthesised or read from JSON lines
azure.py, burstgpt.py, mooncake.py, sharegpt.py   published formats, read and written
tool_calls.py     conversations whose next call follows a tool
servegen.py       clients of a service, each with its rates, bursts and lengths: read, written and drawn from
fields.py         values of untrusted files (csv_lines.py: lines of comma-separated ones)
"""

from plait.workload.arrivals import (
    DailyRate,
    all_at_once_s,
    arrival_times_s,
    constant_arrivals_s,
    daily_arrivals_s,
    gamma_arrivals_s,
    on_off_arrivals_s,
    poisson_arrivals_s,
)
from plait.workload.azure import format_azure, parse_azure
from plait.workload.burstgpt import format_burstgpt, parse_burstgpt
from plait.workload.conversations import ConversationMix, synthesize_conversations
from plait.workload.fields import PROMPT_BLOCK_TOKENS
from plait.workload.lengths import (
    LENGTH_MIXES,
    Equal,
    LengthDistribution,
    LengthMix,
    LogNormal,
    Quantiles,
    Uniform,
    length_mix_named,
)
from plait.workload.mooncake import format_mooncake, parse_mooncake, spread_arrivals
from plait.workload.prefixes import (
    PREFIX_REUSES,
    PrefixReuse,
    PrefixStatistics,
    PromptBlocks,
    prefix_statistics,
    zipf_weights,
)
from plait.workload.servegen import (
    ArrivalWindow,
    LengthHistogram,
    ServeGenClient,
    format_servegen,
    parse_servegen,
    synthesize_clients,
)
from plait.workload.sharegpt import USUAL_FILTER, ShareGptFilter, format_sharegpt, parse_sharegpt
from plait.workload.tool_calls import format_tool_calls, parse_tool_calls
from plait.workload.traces import TraceRequest, format_trace, parse_trace, synthesize_trace

__all__ = [
    "LENGTH_MIXES",
    "PREFIX_REUSES",
    "PROMPT_BLOCK_TOKENS",
    "USUAL_FILTER",
    "ArrivalWindow",
    "ConversationMix",
    "DailyRate",
    "Equal",
    "LengthDistribution",
    "LengthHistogram",
    "LengthMix",
    "LogNormal",
    "PrefixReuse",
    "PrefixStatistics",
    "PromptBlocks",
    "Quantiles",
    "ServeGenClient",
    "ShareGptFilter",
    "TraceRequest",
    "Uniform",
    "all_at_once_s",
    "arrival_times_s",
    "constant_arrivals_s",
    "daily_arrivals_s",
    "format_azure",
    "format_burstgpt",
    "format_mooncake",
    "format_servegen",
    "format_sharegpt",
    "format_tool_calls",
    "format_trace",
    "gamma_arrivals_s",
    "length_mix_named",
    "on_off_arrivals_s",
    "parse_azure",
    "parse_burstgpt",
    "parse_mooncake",
    "parse_servegen",
    "parse_sharegpt",
    "parse_tool_calls",
    "parse_trace",
    "poisson_arrivals_s",
    "prefix_statistics",
    "spread_arrivals",
    "synthesize_clients",
    "synthesize_conversations",
    "synthesize_trace",
    "zipf_weights",
]
