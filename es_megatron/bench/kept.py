"""Finished runs of a comparison in one file: to be committed beside the spec, and not to be run again elsewhere."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from es_megatron.bench.identity import Flat, flat, same_settings
from es_megatron.bench.runs import Outcome, Task
from es_megatron.bench.spec import Spec
from es_megatron.errors import ConfigError

FIELDS = (
    *("finished", "scored_share", "sequences_scored", "sequences_trained", "iterations", "plain_iterations"),
    *("meta_batch", "passes", "tokens_scored", "tokens_trained", "chosen"),
)
"""Of a run's summary, as they are."""
LAYOUT = ("forward", "backward", "scoring_forward", "micro_batches", "scoring_micro_batches")
DIGITS = 6

Charges = Mapping[tuple[str, str], float]
"""What the reference of a case's arm cost, as a share of the plain run's cost."""


class KeptRuns:
    """The file of one spec."""

    def __init__(self, path: Path, spec: Spec | None = None) -> None:
        """Read it, if it is there.

        Args:
            path: JSON; its folder is made at the first write.
            spec: runs of others are left out at the next write.

        Raises:
            ConfigError: it is something else.
        """
        self._path, self._spec = path, spec
        self._entries: dict[Task, dict[str, Any]] = {}
        self.charges: dict[tuple[str, str], float] = {}
        if not path.is_file():
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            for entry in content["runs"]:
                gone = entry.pop("without", ())
                settings = {**content["settings"], **entry["settings"]}
                entry["settings"] = {name: value for name, value in settings.items() if name not in gone}
                self._entries[_task(entry)] = entry
            self.charges = _pairs(content["charges"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"Results `{path}` cannot be read ({error!r}): correct it, or remove it.") from error

    def find(self, identity: Mapping[str, Any]) -> Outcome | None:
        """A finished run with this identity."""
        data, settings = data_digest(identity), flat(identity["settings"])
        found = (entry for entry in self._entries.values() if entry["data"] == data)
        return next((Outcome(each["summary"]) for each in found if same_settings(each["settings"], settings)), None)

    @property
    def outcomes(self) -> dict[Task, Outcome]:
        """All runs, by what they were."""
        return {task: Outcome(entry["summary"]) for task, entry in self._entries.items()}

    def note(self, task: Task, identity: Mapping[str, Any], outcome: Outcome) -> None:
        """Take a finished run in."""
        told = {"data": data_digest(identity), "settings": flat(identity["settings"])}
        told["summary"] = compact(outcome.summary)
        self._entries[task] = {**task._asdict(), **told}

    def write(self, charges: Charges) -> None:
        """Write what there is, run by run on a line of its own, so that a change is a small difference."""
        self.charges = {**self.charges, **charges}
        kept = {key: price for key, price in self.charges.items() if self._named(*key)}
        entries = [entry for entry in self._entries.values() if self._named(entry["case"], entry["arm"])]
        runs = sorted(entries, key=_order)
        usual = _most_common([entry["settings"] for entry in runs])
        lines = ",\n".join(json.dumps(_against(entry, usual)) for entry in runs)
        told = json.dumps({case: {arm: _short(kept[c, arm]) for c, arm in kept if c == case} for case, _ in kept})
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".tmp")
        settings = json.dumps(usual, sort_keys=True)
        content = f'{{"charges": {told},\n"settings": {settings},\n"runs": [\n{lines}\n]}}\n'
        partial.write_text(content, encoding="utf-8")
        partial.replace(self._path)

    def _named(self, case: str, arm: str) -> bool:
        return self._spec is None or (case in self._spec.cases and arm in self._spec.arms)


def data_digest(identity: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits of what a run was made of beside its settings: blend and versions."""
    others = {name: value for name, value in identity.items() if name != "settings"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()[:16]


def _most_common(settings: Sequence[Flat]) -> dict[str, Any]:
    """Of each setting the value that most runs have."""
    counts: dict[str, Counter[str]] = {}
    for each in settings:
        for name, value in each.items():
            counts.setdefault(name, Counter())[json.dumps(value)] += 1
    return {name: json.loads(count.most_common(1)[0][0]) for name, count in counts.items()}


def _against(entry: Mapping[str, Any], usual: Flat) -> dict[str, Any]:
    """A run with only those settings that differ from the usual ones, and the names of those that it has not."""
    settings: Flat = entry["settings"]
    differ = {name: value for name, value in settings.items() if value != usual[name]}
    gone = sorted(usual.keys() - settings.keys())
    return {**entry, "settings": differ, **({"without": gone} if gone else {})}


def compact(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What `results` reads of a run's summary, to six digits."""
    told = {name: summary[name] for name in FIELDS}
    told["layout"] = {name: summary["layout"][name] for name in LAYOUT}
    told["validation"] = summary["validation"]
    told["seconds"] = {"step": summary["seconds"]["step"]}
    return _short(told)


def _short(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _short(each) for name, each in cast(Mapping[str, Any], value).items()}
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _task(entry: Mapping[str, Any]) -> Task:
    return Task(**{name: entry[name] for name in Task._fields})


def _order(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    task = _task(entry)
    return task.case, task.arm, task.rate, task.decay or 0.0, task.seed


def _pairs(charges: Mapping[str, Mapping[str, float]]) -> dict[tuple[str, str], float]:
    return {(case, arm): price for case, arms in charges.items() for arm, price in arms.items()}
