"""Joules per token where no meter is: power times time, and what memory and arithmetic alone would take.

    E = bytes read * e_byte + products * e_mac + P_static * t

The first two terms are physics and small; static power and clocks are most of it, so that energy follows time. What a
device takes under load is known for all of them (`Device.tdp_w`), of which writing a token by token draws a share: the
whole is that share times the time, and what memory and arithmetic leave of it is static. Without a figure for power the
first two terms are all that is said, and are called a floor.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from spicerack.errors import UsageError
from spicerack.machine.catalogue import Device
from spicerack.planning.model import Model
from spicerack.planning.plan import Goal, check, row_of
from spicerack.planning.precisions import Precision
from spicerack.planning.speed import kind_of

SPREAD = 0.4
"""What an estimate of power times time is wrong by, relative: published joules per token differ so from it."""
_SHARE = {"cpu": 0.9, "memory": 0.9}
"""Of its power under load, what a processor draws while it writes: .8 to 1."""
_SHARE_OF_OTHERS = 0.6
"""The same of cards and chips that wait for memory: .5 to .7."""
PJ_PER_BIT = {"hbm": 5.5, "lpddr": 5.5, "gddr": 7.5, "ddr": 17.5}
"""Kind of memory -> 10^-12 joules of a bit that is read: HBM and LPDDR5 4 to 7, GDDR6 and 7 7 to 8, DDR4 and 5 15 to
20."""
_HBM = ("sm70", "sm80", "sm90", "sm100", "gfx90a", "gfx942")
"""Chips that have it; all other cards have GDDR."""
PJ_PER_MAC = 4.6
"""10^-12 joules of a product in float32 and its addition, at 45 nm (Horowitz, ISSCC 2014): integers and newer chips
take less, and it is little beside the rest."""


@dataclass(frozen=True, slots=True)
class Estimated:
    """What a token is expected to take.

    device             that was assumed;  watts: of it under load, None where that is not known
    tokens_per_s       expected;  basis: where that is from
    read_bytes, macs   of a token
    memory_joules, arithmetic_joules   the floor
    static_joules      the rest of power times time; None without watts
    pj_per_bit, pj_per_mac, share      constants: of power under load, the share that is drawn
    """

    device: str
    watts: float | None
    tokens_per_s: float
    basis: str
    read_bytes: int
    macs: int
    memory_joules: float
    arithmetic_joules: float
    static_joules: float | None
    pj_per_bit: float
    pj_per_mac: float
    share: float

    @property
    def floor(self) -> float:
        """Joules of memory and arithmetic alone."""
        return self.memory_joules + self.arithmetic_joules

    @property
    def joules_per_token(self) -> float | None:
        """All terms; None where power is not known."""
        return None if self.static_joules is None else self.floor + self.static_joules

    def as_dict(self) -> dict[str, Any]:
        """JSON, under the names of the command line's contract."""
        total = self.joules_per_token
        between = None if total is None else [total * (1 - SPREAD), total * (1 + SPREAD)]
        return {
            "how": "estimated",
            "joules_per_token": total,
            "joules_per_token_range": between,
            "floor_joules_per_token": self.floor,
            **asdict(self),
        }


def estimate(model: Model, precision: Precision, goal: Goal, watts: float | None = None) -> Estimated:
    """Joules of a token that one user's model writes on the goal's first device.

    watts: of the device under load; None takes the catalogue's. Raises UsageError with the reason where no speed can be
    said, or where several devices would share the work.
    """
    if len(goal.devices) > 1:
        raise UsageError("energy is estimated for one device", "give one, as in --fit 3090")
    check(model, goal)
    row = row_of(model, precision, goal)
    if row.speed is None:
        raise UsageError(f"no energy can be estimated: {row.speechless}", "a meter would tell: spicerack energy --help")
    device = goal.devices[0]
    watts = device.tdp_w if watts is None else watts
    share = _SHARE.get(kind_of(device), _SHARE_OF_OTHERS)
    pj_per_bit = PJ_PER_BIT[memory_of(device)]
    memory, arithmetic = row.weights.read * 8 * pj_per_bit * 1e-12, model.read * PJ_PER_MAC * 1e-12
    static = None if watts is None else max(share * watts / row.speed.decode - memory - arithmetic, 0.0)
    return Estimated(
        device.name, watts, row.speed.decode, row.speed.basis, row.weights.read, model.read, memory, arithmetic, static,
        pj_per_bit, PJ_PER_MAC, share,
    )  # fmt: skip


def memory_of(device: Device) -> str:
    """What its memory is, a key of `PJ_PER_BIT`: HBM of cards for computing centres, GDDR of others, LPDDR of chips."""
    if device.kind == "gpu":
        return "hbm" if device.arch in _HBM else "gddr"
    return "lpddr" if device.kind in ("soc", "phone", "watch") else "ddr"
