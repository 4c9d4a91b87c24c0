"""Which option for each unit: the cheapest for every damage, and how far the damage may go."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

POINTS = 4096  # of a frontier that are kept after each unit
WORTH = 0.01  # the share of the cost that another evaluation must promise to save
NEAR = 0.02  # a single scheme that costs so little more than the cheapest mix is tried in its place


@dataclass(frozen=True)
class Candidate:
    """A whole model: which option each unit takes, what that costs, and the sum of the damages."""

    picks: tuple[int, ...]
    cost: float
    damage: float
    single: str = ""  # the scheme, where it is the only one


def frontier(units: Sequence[Sequence[tuple[float, float]]]) -> list[Candidate]:
    """For each sum of damages the cheapest picks, one option for each unit: those that no other undercuts in both.

    units: for each its options' (cost, damage). By dynamic programming: after each unit only the undominated sums stay.
    Exact as long as these are at most POINTS; of more, evenly spread ones and both ends stay. Sorted by damage.
    """
    cost, damage = np.zeros(1), np.zeros(1)
    steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for options in units:
        costs, damages = (np.array([option[i] for option in options], dtype=np.float64) for i in (0, 1))
        cost, damage = (cost[:, None] + costs).ravel(), (damage[:, None] + damages).ravel()
        kept = _undominated(cost, damage)
        if len(kept) > POINTS:
            kept = kept[np.unique(np.linspace(0, len(kept) - 1, POINTS).round().astype(np.int64))]
        before, option = np.divmod(kept, len(options))
        steps.append((before, option))
        cost, damage = cost[kept], damage[kept]
    found = []
    for end in range(len(cost)):
        picks, at = [], end
        for before, option in reversed(steps):
            picks.append(int(option[at]))
            at = int(before[at])
        found.append(Candidate(tuple(reversed(picks)), float(cost[end]), float(damage[end])))
    return found


def _undominated(cost: Floats, damage: Floats) -> NDArray[np.int64]:
    """The indices of the points that cost less than all of less damage, and of the same."""
    order = np.lexsort((cost, damage))
    least = np.concatenate([[np.inf], np.minimum.accumulate(cost[order])[:-1]])
    found: NDArray[np.int64] = order[(cost[order] < least) & np.isfinite(damage[order])]
    return found


@dataclass
class Tried:
    """A candidate that was evaluated: what was predicted, and what it scored."""

    candidate: Candidate
    predicted: float
    score: float
    kept: bool


@dataclass
class Loss:
    """What a damage is taken to cost: rate * damage**power of the score; learned anew from each evaluation."""

    rate: float
    power: float

    @classmethod
    def guessed(cls, budget: float, start: float, power: float) -> "Loss":
        """Such that the damage `start` loses the budget."""
        return cls(max(budget, 1e-4) / start**power, power)

    def of(self, damage: float) -> float:
        return self.rate * damage**self.power

    def learn(self, damage: float, loss: float) -> None:
        if loss > 0 and damage > 0:
            self.rate = loss / damage**self.power


def search(
    candidates: Sequence[Candidate],
    evaluate: Callable[[Candidate], float],
    *,
    float_score: float,
    float_cost: float,
    budget: float,
    start: float,
    loss: Loss,
    evaluations: int,
) -> list[Tried]:
    """Looks for the cheapest candidate whose score is at least float_score - budget; returns all that were tried.

    start: the damage that is tried first. Each evaluation moves this target: down where the budget was missed, up where
    it was kept, and never to a candidate with more damage than one that missed it. The last evaluation goes to a single
    scheme, if one is still open that costs less than what was found. Stops where nothing open would save WORTH of the
    cost.
    """
    tried: list[Tried] = []
    best, least, failed, target = float_cost, 0.0, math.inf, start
    for left in range(evaluations, 0, -1):
        done = {one.candidate.picks for one in tried}
        open_ = [
            one for one in candidates if one.cost < (1 - WORTH) * best and one.damage < failed and one.picks not in done
        ]
        if not open_:
            break
        candidate = _next(open_, target, left == 1, found=best < float_cost)
        predicted, score = float_score - loss.of(candidate.damage), evaluate(candidate)
        lost = float_score - score
        one = Tried(candidate, predicted, score, score >= float_score - budget)
        tried.append(one)
        loss.learn(candidate.damage, lost)
        scale = (budget / lost) ** (1 / loss.power) if lost > 0 else math.inf
        if one.kept:
            best, least = candidate.cost, max(least, candidate.damage)
            target = max(start, candidate.damage) * min(max(scale, 2.0), 16.0)
        else:
            failed = candidate.damage
            target = failed * min(max(0.7 * scale, 1 / 64), 0.7)
        if least > 0 and failed < math.inf:
            target = max(math.sqrt(least * failed), least)
    return tried


def _next(open_: Sequence[Candidate], target: float, last: bool, found: bool) -> Candidate:
    """The cheapest within the target, or a single scheme that is nearly as cheap; without any, that of least damage."""
    singles = [one for one in open_ if one.single]
    if last and singles:
        return min(singles, key=lambda one: one.cost if found else one.damage)
    within = [one for one in open_ if one.damage <= target]
    if not within:
        return min(open_, key=lambda one: one.damage)
    cheapest = min(within, key=lambda one: (one.cost, one.damage))
    near = [one for one in within if one.single and one.cost <= (1 + NEAR) * cheapest.cost]
    return min(near, key=lambda one: one.damage) if near else cheapest
