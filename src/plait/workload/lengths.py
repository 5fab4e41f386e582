"""How long prompts and answers are.

Prompt and output lengths are drawn independently: in public traces their correlation is close to 0 (Azure
2023 conversations -0.11, code 0.00). Limits are kept by drawing again, which changes the means; those stated
here are without a limit beyond the mix's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from plait.errors import BadSetup

# A mix of which fewer than one draw in a thousand fits the limits describes some other workload.
_MAX_REDRAWS = 1000


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every length in `tokens` equally often."""

    tokens: range

    def draw(self, count: int, rng: Generator) -> NDArray[np.int64]:
        return rng.integers(self.tokens.start, self.tokens.stop, size=count)


@dataclass(frozen=True, slots=True)
class Equal:
    """The same length always."""

    tokens: int

    def draw(self, count: int, rng: Generator) -> NDArray[np.int64]:
        return np.full(count, self.tokens, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class LogNormal:
    """A long tail: the logarithm is normal around that of the median, with standard deviation `spread`."""

    median_tokens: float
    spread: float

    def draw(self, count: int, rng: Generator) -> NDArray[np.int64]:
        lengths = rng.lognormal(np.log(self.median_tokens), self.spread, size=count)
        return np.rint(np.minimum(lengths, 2**31)).astype(np.int64)


QUANTILE_LEVELS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A measured distribution, by its values at `QUANTILE_LEVELS`; between them the logarithm is uniform."""

    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(QUANTILE_LEVELS) or list(self.tokens) != sorted(self.tokens):
            raise BadSetup(f"quantiles of lengths are {len(QUANTILE_LEVELS)} ascending numbers of tokens")
        if self.tokens[0] < 1:
            raise BadSetup("quantiles of lengths are whole numbers from 1 on")

    def draw(self, count: int, rng: Generator) -> NDArray[np.int64]:
        places = np.interp(rng.random(count), QUANTILE_LEVELS, np.log(self.tokens))
        return np.rint(np.exp(places)).astype(np.int64)

    def fraction_up_to(self, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """The probability of lengths up to these."""
        edges = np.log(np.asarray(tokens, dtype=np.float64) + 0.5)
        return np.interp(edges, np.log(self.tokens), QUANTILE_LEVELS, left=0.0, right=1.0)


LengthDistribution = Uniform | Equal | LogNormal | Quantiles


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthMix:
    """Two distributions and the limits that a request must keep."""

    prompt: LengthDistribution
    output: LengthDistribution
    least_tokens: int = 1
    most_prompt_tokens: int = 2**31
    most_total_tokens: int = 2**31

    def draw(
        self, count: int, rng: Generator, *, most_total_tokens: int = 2**31
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Prompt and output lengths of `count` requests, each of at most `most_total_tokens` together.

        Raises:
            BadSetup: hardly any request of this mix is that short.
        """
        most_total_tokens = min(most_total_tokens, self.most_total_tokens)
        prompts = np.zeros(count, dtype=np.int64)
        outputs = np.zeros(count, dtype=np.int64)
        missing = np.arange(count)
        for _ in range(_MAX_REDRAWS):
            prompt = self.prompt.draw(len(missing), rng)
            output = self.output.draw(len(missing), rng)
            fits = (
                (np.minimum(prompt, output) >= self.least_tokens)
                & (prompt <= self.most_prompt_tokens)
                & (prompt + output <= most_total_tokens)
            )
            prompts[missing[fits]] = prompt[fits]
            outputs[missing[fits]] = output[fits]
            missing = missing[~fits]
            if len(missing) == 0:
                return prompts, outputs
        raise BadSetup(
            f"requests of at most {most_total_tokens} tokens are too rare in this mix of lengths "
            f"({self.prompt} and {self.output}); choose shorter lengths or a model with a longer context"
        )


LENGTH_MIXES: Mapping[str, LengthMix] = MappingProxyType(
    {
        # The synthetic trace of Orca (Yu et al. 2022, section 6.1): means 272 and 64.5.
        "uniform": LengthMix(prompt=Uniform(range(32, 513)), output=Uniform(range(1, 129))),
        # Its means, without its variance: where batching by request loses nothing.
        "equal": LengthMix(prompt=Equal(272), output=Equal(64)),
        # Most answers short, a few very long: where batching by request loses most.
        "long-tail": LengthMix(
            prompt=LogNormal(median_tokens=128, spread=0.8),
            output=LogNormal(median_tokens=32, spread=1.2),
            most_prompt_tokens=1024,
            most_total_tokens=2048,
        ),
        # Means of ShareGPT in Kwon et al. 2023, figure 11 (161.31 and 337.99), and the filter of vLLM's
        # benchmark. The means fix the medians for spreads that we chose; the data set itself is not used.
        "sharegpt-like": LengthMix(
            prompt=LogNormal(median_tokens=89.6, spread=1.5),
            output=LogNormal(median_tokens=244.5, spread=0.9),
            least_tokens=4,
            most_prompt_tokens=1024,
            most_total_tokens=2048,
        ),
        # Means of Alpaca in the same figure (19.31 and 58.45); the spreads are our choice again.
        "alpaca-like": LengthMix(
            prompt=LogNormal(median_tokens=16.1, spread=0.6),
            output=LogNormal(median_tokens=35.3, spread=1.0),
            most_total_tokens=2048,
        ),
        # Quantiles of published traces, counted in their files: Azure's of 2023, Mooncake's of FAST 2025, and the
        # three that APEX was evaluated on.
        "azure-conv": LengthMix(
            prompt=Quantiles((2, 29, 181, 207, 396, 1020, 1189, 2734, 4083, 4142, 14050)),
            output=Quantiles((7, 16, 41, 54, 85, 129, 395, 424, 451, 601, 1000)),
        ),
        "azure-code": LengthMix(
            prompt=Quantiles((3, 17, 75, 147, 578, 1469, 2745, 5186, 7302, 7436, 7437)),
            output=Quantiles((6, 6, 6, 7, 9, 13, 24, 55, 90, 252, 1899)),
        ),
        "mooncake-conv": LengthMix(
            prompt=Quantiles((891, 894, 901, 964, 2307, 6909, 15366, 27367, 39549, 85401, 126195)),
            output=Quantiles((1, 3, 10, 24, 157, 350, 472, 597, 698, 1120, 2000)),
        ),
        "mooncake-synthetic": LengthMix(
            prompt=Quantiles((13, 16, 22, 30, 277, 11587, 23175, 38615, 48835, 66456, 191378)),
            output=Quantiles((1, 2, 2, 4, 11, 69, 250, 389, 519, 768, 893)),
        ),
        "arxiv-summarization": LengthMix(
            prompt=Quantiles((1, 73, 749, 1242, 1986, 2730, 3370, 3702, 3813, 3933, 4054)),
            output=Quantiles((5, 36, 60, 78, 115, 167, 242, 372, 736, 3270, 4056)),
        ),
        "creation": LengthMix(
            prompt=Quantiles((100, 139, 179, 199, 244, 309, 362, 400, 423, 567, 1232)),
            output=Quantiles((236, 351, 526, 627, 825, 1107, 1450, 1708, 1798, 2368, 3501)),
        ),
        "lmsys-chat": LengthMix(
            prompt=Quantiles((2, 2, 3, 5, 9, 17, 45, 178, 308, 589, 1037)),
            output=Quantiles((1, 2, 8, 12, 36, 118, 262, 390, 436, 534, 761)),
        ),
    }
)


def length_mix_named(name: str) -> LengthMix:
    """Look up a mix.

    Raises:
        BadSetup: unknown name; the message lists the known ones.
    """
    mix = LENGTH_MIXES.get(name)
    if mix is None:
        raise BadSetup(f"no mix of lengths is called {name!r}; known are {', '.join(sorted(LENGTH_MIXES))}")
    return mix
