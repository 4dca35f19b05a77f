"""What the results files say, against the aims and in sentences: numbers from files, words from verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from es_megatron.bench.results import ArmResult, Results
from es_megatron.bench.statistics import PairedDifference

RULES = ("excess", "residual", "band")
"""The rules of `reducible` that use the run's own losses."""
SETTINGS = ("history", *RULES, "static", "paper")
"""What a user can set, with the blend kept or as a preset has it: the advice is one of these, or a uniform choice."""
OTHERS = ("history", "history-free", *RULES, "static", "band-same")
"""What else was tried where the best rule misses an aim."""
WANTED = 0.05
"""Nats below uniform that are aimed at on damaged text."""
WORST = 0.02
"""Nats above uniform that the lower end of no domain's interval may pass."""
LEVEL = 0.02
"""Nats above plain within which a mean, whose interval has 0, counts as level: a wide interval alone does not."""


class Place(NamedTuple):
    """A case of a spec, and what the page calls it."""

    spec: str
    case: str
    name: str


DAMAGED = (
    Place("tuning", "damaged", "demo text"),
    Place("tuning", "wiki-damaged", "Wikipedia and dialogue"),
    Place("proving", "damaged", "proving blend"),
)
CHOSEN_ON = DAMAGED[:2]
"""Where the best rule is chosen: tuning blends only."""
WIKI = "wiki"
"""Case of a second tuning blend: of clean text; `wiki-CASE` are the others."""


class Aim(NamedTuple):
    """One aim and what became of it."""

    what: str
    found: str
    verdict: str
    """`met`, `missed`, or `open` while runs are missing."""
    tried: str = ""
    """What came of other arms where it was missed."""


class Advice(NamedTuple):
    """What to set for a kind of text, chosen on the tuning blends."""

    case: str
    arm: str
    """`uniform` where nothing was better there."""
    tuning: tuple[Place, ...]
    proving: tuple[Place, ...]


class Findings:
    """The headlines of the tuning and of the proving blends."""

    def __init__(self, results: Mapping[str, Results]) -> None:
        """Take what `compare` concludes, by spec."""
        self._arms: dict[tuple[str, str, str], ArmResult] = {
            (name, case.case, arm): one
            for name, each in results.items()
            for case in each.cases
            for arm, one in case.arms.items()
        }
        self.rule = self._best_rule()

    def _best_rule(self) -> str:
        """The rule with the lowest mean difference to uniform on the damaged tuning blends, as far as they are run."""
        places = [place for place in CHOSEN_ON if all(self.difference(place, rule) for rule in RULES)]
        sums = {rule: math.fsum(self.mean(place, rule) for place in places) for rule in RULES}
        return min(RULES, key=lambda rule: sums[rule])

    def difference(self, place: Place, arm: str, reference: str = "uniform") -> PairedDifference | None:
        """An arm against another; None where nothing has been run."""
        found = self._arms.get((place.spec, place.case, arm))
        against = None if found is None else found.against.get(reference)
        return against if against is not None and against.seeds else None

    def mean(self, place: Place, arm: str, reference: str = "uniform") -> float:
        """Mean difference; nan where nothing has been run."""
        found = self.difference(place, arm, reference)
        return math.nan if found is None else found.mean

    def price(self, place: Place, arm: str) -> float:
        """Cost of an arm's reference as a share of the plain run's; nan where nothing has been run."""
        found = self._arms.get((place.spec, place.case, arm))
        return math.nan if found is None else found.reference

    def told(self, places: Sequence[Place], arm: str, reference: str = "uniform") -> str:
        """An arm against another in several places."""
        if all(self.difference(place, arm, reference) is None for place in places):
            return "not run yet"
        return ", ".join(f"{place.name} {interval(self.difference(place, arm, reference))}" for place in places)

    def complete(self, places: Sequence[Place], arm: str) -> bool:
        """Whether an arm's differences to uniform are there, all seeds of them."""
        found = [self.difference(place, arm) for place in places]
        return all(one is not None and one.verdict != "open" for one in found)

    def worst_domain(self, arm: str) -> tuple[str, PairedDifference] | None:
        """The domain with the highest lower end against uniform, over all cases that are complete."""
        found = [
            (f"{domain} in {case} of {spec}", one)
            for (spec, case, name), each in self._arms.items()
            for domain, one in each.domains_against.get("uniform", {}).items()
            if name == arm and one.verdict != "open"
        ]
        return max(found, key=lambda each: each[1].low, default=None)

    def aims(self) -> list[Aim]:
        """All aims."""
        rule = self.rule
        worst = self.worst_domain(rule)
        found = "open" if worst is None else f"worst: {worst[0]}, {interval(worst[1])}"
        domains = "open" if worst is None else ("met" if worst[1].low <= WORST else "missed")
        worsts = {arm: self.worst_domain(arm) for arm in OTHERS if arm != rule} if domains == "missed" else {}
        others = "; ".join(f"`{arm}` {one[1].mean:+.3f} ({one[0]})" for arm, one in worsts.items() if one)
        return [
            self._aim(f"40% damaged: {WANTED} below uniform, or more", DAMAGED, "uniform", lambda d: d.mean <= -WANTED),
            self._aim("40% damaged: level with plain on one blend", DAMAGED, "plain", level, any),
            self._aim("one pass over damaged text: below uniform", both("once-damaged"), "uniform", below),
            self._aim("copies: below plain", both("copies"), "plain", below),
            self._aim("copies: below history with the mixture free", both("copies"), "history-free", below),
            self._aim("clean text, 4 passes: below uniform", both("clean"), "uniform", below),
            Aim(f"no domain's lower end above +{WORST} against uniform", found, domains, others),
            self._aim("40% damaged: below the static filter by the same reference", DAMAGED, "static", below),
        ]

    def _aim(
        self,
        what: str,
        places: Sequence[Place],
        reference: str,
        holds: Callable[[PairedDifference], bool],
        need: Callable[[list[bool]], bool] = all,
    ) -> Aim:
        found = [self.difference(place, self.rule, reference) for place in places]
        whole = [one for one in found if one is not None and one.verdict != "open"]
        verdict = "met" if need([holds(one) for one in whole]) else "missed"
        verdict = verdict if len(whole) == len(places) else "open"
        tried = self._tried(places, reference) if verdict == "missed" else ""
        return Aim(what, self.told(places, self.rule, reference), verdict, tried)

    def _tried(self, places: Sequence[Place], reference: str) -> str:
        """Means of the other arms, in the order of the places."""
        told: list[str] = []
        for arm in OTHERS:
            means = [self.mean(place, arm, reference) for place in places]
            if arm not in (self.rule, reference) and not any(map(math.isnan, means)):
                told.append(f"`{arm}` {' / '.join(f'{mean:+.3f}' for mean in means)}")
        return "; ".join(told)

    def advice(self) -> list[Advice]:
        """For every case of both specs whose runs are complete on the tuning blends, what was best there.

        Only an arm whose interval leaves 0 out on every tuning blend of that case is preferred to a uniform choice.
        """
        found: list[Advice] = []
        for spec, case, arm in self._arms:
            if spec != "tuning" or arm != "uniform" or case.startswith(WIKI):
                continue
            demo, proving = both(case)
            wiki = Place(spec, WIKI if case == "clean" else f"{WIKI}-{case}", CHOSEN_ON[1].name)
            places = [place for place in (demo, wiki) if (spec, place.case, arm) in self._arms]
            if not all(self.complete(places, name) for name in SETTINGS):
                continue
            better = [name for name in SETTINGS if all(self.verdict(place, name) == "wins" for place in places)]
            best = min(better, key=lambda name: math.fsum(self.mean(place, name) for place in places), default=arm)
            found.append(Advice(case, best, tuple(places), (proving,)))
        return found

    def verdict(self, place: Place, arm: str, reference: str = "uniform") -> str:
        """What came of an arm against another; `open` where runs are missing."""
        found = self.difference(place, arm, reference)
        return "open" if found is None else found.verdict

    def tally(self, arm: str, specs: Sequence[str] = ("tuning", "proving")) -> str:
        """In how many cases an arm was better and worse than uniform, and not told apart."""
        verdicts = [
            one.against["uniform"].verdict
            for (spec, _, name), one in self._arms.items()
            if spec in specs and name == arm and "uniform" in one.against
        ]
        better, even, worse = (verdicts.count(each) for each in ("wins", "ties", "loses"))
        return f"better in {better} cases, not told apart in {even}, worse in {worse}"

    def expected(self, spec: str) -> dict[str, dict[str, Any]]:
        """Differences to uniform and to plain (low, mean, high) by case and arm, of those that are complete."""
        found: dict[str, dict[str, Any]] = {}
        for (name, case, arm), each in self._arms.items():
            told = {
                reference: [round(one.low, 4), round(one.mean, 4), round(one.high, 4)]
                for reference, one in each.against.items()
                if reference in ("uniform", "plain") and one.verdict != "open"
            }
            if name == spec and told:
                found.setdefault(case, {})[arm] = told
        return found


def both(case: str) -> tuple[Place, ...]:
    """A case of both specs."""
    return Place("tuning", case, "demo text"), Place("proving", case, "proving blend")


def below(difference: PairedDifference) -> bool:
    """The whole interval is below 0."""
    return difference.high < 0


def level(difference: PairedDifference) -> bool:
    """Not told apart, and near."""
    return difference.low <= 0 and difference.mean <= LEVEL


def interval(difference: PairedDifference | None) -> str:
    """A difference with its interval; how many seeds there are while it is open."""
    if difference is None:
        return "not run yet"
    if difference.verdict == "open":
        return f"{difference.mean:+.3f} ({difference.seeds} seeds so far)"
    return f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
