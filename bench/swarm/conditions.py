"""How far away and how slow a machine is made; every process of the swarm reads its own from a file."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from plait.ids import PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """One machine's.

    `one_way_s`: what this machine's bytes take to each other one; whoever is not named is next to it. A forward pass
    of t tokens takes `pass_s + row_s * t` for each of its blocks, which includes what it really takes; 0 for both: as
    long as it takes. `passes` is where the machine says how that went. `bytes_per_s`: of each of those links, one way;
    None is no limit. Attending over blocks that it lent takes this machine `attend_times` as long as it really does.
    """

    one_way_s: dict[PeerId, float]
    pass_s: float
    row_s: float
    passes: str
    bytes_per_s: float | None = None
    attend_times: float = 1.0

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, file: Path) -> Self:
        return cls(**json.loads(file.read_text()))
