"""Sampling parameters as they travel to the last hop, and back."""

from collections.abc import Iterable

from plait.errors import BadRequest
from plait.session.sampling_params import Constraint, SamplingParams
from plait.wire import WireConstraint, WireSampling


def to_wire_sampling(
    params: SamplingParams, *, seed: int, sample_index: int, end_token_ids: Iterable[int]
) -> WireSampling:
    """What the last hop needs of `params` for one of its samples; `end_token_ids` are the model's own.

    Raises:
        BadRequest: it asks for something that a chain of workers does not do.
    """
    for asked, name in (
        (params.beam_width > 0, "beam_width"),
        (params.best_of is not None and params.best_of > params.n, "best_of"),
        (params.prompt_logprobs is not None, "prompt_logprobs"),
    ):
        if asked:
            raise BadRequest(
                f"{name} is not available on a model that several machines serve together", param=name
            )
    stops = set(params.stop_token_ids or ())
    if not params.ignore_eos:
        stops.update(end_token_ids)
    constraint = params.constraint
    return WireSampling(
        seed=seed,
        sample_index=sample_index,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=dict(params.logit_bias or {}),
        min_tokens=params.min_tokens,
        stop_token_ids=tuple(sorted(stops)),
        logprobs=params.logprobs,
        constraint=None if constraint is None else WireConstraint(constraint.kind, constraint.text),
    )


def from_wire_sampling(sampling: WireSampling) -> SamplingParams:
    """The parameters to sample one row after another with; all that ends the answer is in `stop_token_ids`.

    Raises:
        BadRequest: a value out of its range.
    """
    constraint = sampling.constraint
    return SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=sampling.logit_bias or None,
        max_tokens=None,
        min_tokens=sampling.min_tokens,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=True,
        logprobs=sampling.logprobs,
        constraint=None if constraint is None else Constraint(kind=constraint.kind, text=constraint.text),
    )
