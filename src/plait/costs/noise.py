"""Steps that vary as measured ones do: a model's answers times log-normal factors of mean 1."""

import math

from numpy.random import Generator

from plait.costs.model import CostModel, IdealSeconds
from plait.costs.work import StepWork


class NoisyCosts:
    """A `CostModel` that draws; everything but the seconds of steps is that of `model`.

    `log_spread` is the standard deviation of log(measured / predicted). The same generator gives the same times in the
    same order of questions; a driver asks once for each step.
    """

    def __init__(self, model: CostModel, log_spread: float, rng: Generator) -> None:
        self._model = model
        self._log_spread = log_spread
        self._rng = rng

    @property
    def weight_bytes(self) -> int:
        return self._model.weight_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        return self._model.kv_bytes_per_token

    @property
    def hidden_bytes_per_token(self) -> int:
        return self._model.hidden_bytes_per_token

    @property
    def idle_watts(self) -> float:
        return self._model.idle_watts

    @property
    def extrapolated_steps(self) -> int:
        return self._model.extrapolated_steps

    def step_s(self, work: StepWork) -> float:
        drawn = self._log_spread * self._rng.standard_normal() - self._log_spread**2 / 2
        return self._model.step_s(work) * math.exp(drawn)

    def attention_s(self, work: StepWork) -> float:
        return self._model.attention_s(work)

    def host_s(self, work: StepWork) -> float:
        return self._model.host_s(work)

    def ideal(self, work: StepWork) -> IdealSeconds | None:
        return self._model.ideal(work)

    def energy_j(self, work: StepWork) -> float:
        return self._model.energy_j(work)
