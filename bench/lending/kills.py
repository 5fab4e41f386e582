"""Creditor, debtor and manager are killed and frozen under running answers, at moments drawn from a seed."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from lending.asking import OneMachine, Wish, ask
from lending.small_pools import SmallPools

POOLS = {name: 64 for name in ("w", "x", "y", "z")}
ROLES = ("creditor", "debtor", "manager")
FREE_WITHIN_S = 40.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """One trial: a long answer on the debtor, and one on each other machine beside it.

    Seconds: from the signal until the debtor (the gateway, of the debtor itself) noticed; the longest pause of the
    long answer after it; until all that was left said that its pool was free, once the answers had ended.
    """

    trial: int
    victim: str
    signal: str
    at_token: int
    same_tokens: bool
    bystanders_same: bool
    error: str
    borrowed_blocks: int
    noticed_s: float | None
    pause_s: float
    free_after_s: float | None
    free_again_s: float | None


class KillTrials:
    """Trials against one swarm; who was killed is started again."""

    def __init__(self, swarm: SmallPools, one: OneMachine, seed: int) -> None:
        self._swarm, self._one = swarm, one
        self._rng = np.random.default_rng(seed)
        self._give_roles()
        self.strikes: list[Strike] = []

    def run(self, trials: int) -> None:
        kinds = [(role, signal) for signal in ("kill", "freeze") for role in ROLES]
        for trial in range(trials):
            self._one_trial(trial, *kinds[trial % len(kinds)])

    def _give_roles(self) -> None:
        """The manager is who says that it is; of the others one is the debtor, in the order of their names."""
        swarm = self._swarm
        swarm.wait_for(lambda: sum(swarm.loans(name)["manages"] for name in swarm.pools) == 1, "one manager")
        self._manager = next(name for name in swarm.pools if swarm.loans(name)["manages"])
        self._debtor, *self._others = sorted(swarm.pools.keys() - {self._manager})

    def _one_trial(self, trial: int, role: str, signal: str) -> None:
        swarm = self._swarm
        self._give_roles()
        wish = Wish(
            number=2000 + trial, prompt_tokens=900, answer_tokens=500, seed=trial if trial % 2 else None
        )
        beside = {
            name: Wish(number=3000 + 10 * trial + place, prompt_tokens=150, answer_tokens=250)
            for place, name in enumerate((self._debtor, self._manager, *self._others))
        }
        # From 1,024 tokens on it borrows.
        at_token = int(self._rng.integers(150, 450))
        struck: list[tuple[str, float]] = []
        borrowed: list[int] = []

        def strike(count: int) -> None:
            if count < at_token or struck:
                return
            loans = swarm.loans(self._debtor)
            borrowed.append(loans["borrowed_blocks"])
            victim = {"debtor": self._debtor, "manager": self._manager}.get(role) or self._creditor()
            act = swarm.freeze if signal == "freeze" else swarm.kill
            struck.append((victim, act(victim)))

        with ThreadPoolExecutor(1 + len(beside)) as pool:
            long = pool.submit(ask, swarm.origin, wish, strike, route={"pinned": [self._debtor]})
            short = {
                name: pool.submit(ask, swarm.origin, each, route={"pinned": [name]})
                for name, each in beside.items()
            }
            answer = long.result()
            answers = {name: each.result() for name, each in short.items()}
        victim, at_s = struck[0] if struck else ("", time.time())
        others_free_s = swarm.all_free_s(FREE_WITHIN_S, without={victim})
        self._put_back(victim, signal)
        free_again_s = swarm.all_free_s(FREE_WITHIN_S)
        witness = swarm.gateway if victim == self._debtor else swarm.machines[self._debtor]
        seen_s = witness.lost_unix_s(swarm.peers[victim], at_s) if victim else None
        run = Strike(
            trial=trial,
            victim=role,
            signal=signal,
            at_token=at_token,
            same_tokens=answer.token_ids == self._one.tokens(wish),
            bystanders_same=all(
                answers[name].token_ids == self._one.tokens(each) for name, each in beside.items()
            ),
            error="; ".join(filter(None, (answer.error, *(each.error for each in answers.values())))),
            borrowed_blocks=borrowed[0] if borrowed else 0,
            noticed_s=None if seen_s is None else seen_s - at_s,
            pause_s=answer.pause_s(at_s),
            free_after_s=others_free_s,
            free_again_s=free_again_s,
        )
        self.strikes.append(run)
        print(run, flush=True)

    def _creditor(self) -> str:
        """Who has lent most to the debtor, other than the manager if there is one."""
        lent = {name: self._swarm.loans(name)["lent_blocks"] for name in self._others}
        return max(lent, key=lambda name: lent[name])

    def _put_back(self, victim: str, signal: str) -> None:
        if not victim:
            return
        if signal == "freeze":
            self._swarm.thaw(victim)
        else:
            self._swarm.restart(victim)
        self._swarm.wait_online()
