"""Everything that is said about a config: findings, the plan, and what would be written."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import NoReturn

from es_megatron.checks.deepspeed_config import check_blocks_in_yaml, check_deepspeed
from es_megatron.checks.findings import Finding, blocking, report
from es_megatron.checks.megatron_config import check
from es_megatron.checks.sizes import Proposal, measure, propose
from es_megatron.checks.training_script import task_of, was_read
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.config.names import given_names, settings_in
from es_megatron.config_files.existing_run import ExistingRun
from es_megatron.config_files.passes import passes_of
from es_megatron.config_files.reading import KINDS, Source
from es_megatron.errors import ConfigError
from es_megatron.frameworks import arguments as flags
from es_megatron.scoring import PLAIN

FIELDS = frozenset(setting.name for setting in settings_in(EvolvedSamplingConfig))
ORDER = ("REFUSE", "NOTE", "OK")


@dataclass(frozen=True)
class Wishes:
    """Settings of Evolved Sampling that the user told."""

    config: EvolvedSamplingConfig
    given: frozenset[str]
    """Fields that were told, and are never changed."""
    passes: float | None = None


@dataclass(frozen=True)
class Report:
    """What was found."""

    heading: str
    findings: tuple[Finding, ...]
    proposal: Proposal

    @property
    def refused(self) -> bool:
        """Whether anything must change first."""
        return bool(blocking(self.findings))

    def text(self) -> str:
        """The report as printed."""
        tail = ["refused: nothing is written; change what is marked REFUSE"] if self.refused else self.proposal.lines()
        return report(self.findings, tail, self.heading)


def examine(name: str, source: Source, wishes: Wishes) -> Report:
    """Check every run of a config; the plan is that of the first one.

    Raises:
        ConfigError: a size is no number, or settings in the config are out of range.
    """
    wishes = wishes_in(source, wishes)
    reports = [examine_run(source.runs[0], wishes)]
    settled = Wishes(reports[0][1].config, FIELDS, wishes.passes)
    reports += [examine_run(run, settled) for run in source.runs[1:]]
    findings = dict.fromkeys(finding for each, _ in reports for finding in each)
    ordered = sorted(findings, key=lambda finding: ORDER.index(finding.severity))
    numbers = sorted({source.text.count("\n", 0, launch.at) + 1 for launch in source.launches})
    lines = [str(number) for number in numbers]
    where = f", launched on line{'s' if len(lines) > 1 else ''} {', '.join(lines)}" if lines else ""
    return Report(f"{name}: {KINDS[source.kind]}{where}", tuple(ordered), reports[0][1])


def wishes_in(source: Source, wishes: Wishes) -> Wishes:
    """What a patched config says itself, unless the user says more."""
    if not source.settings or wishes.given:
        return wishes
    if isinstance(source.settings, tuple):
        namespace = flags.add_arguments(_Parser(add_help=False)).parse_args(list(source.settings))
        switches = flags.read_switches(namespace)
        config, given = switches.config, switches.given
    else:
        config, given = EvolvedSamplingConfig.from_mapping(source.settings), given_names(source.settings)
    return Wishes(config or EvolvedSamplingConfig(arm=PLAIN), given, wishes.passes)


class _Parser(argparse.ArgumentParser):
    """Of flags that stand in a config: what is wrong with them is an error like any other."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"The flags `--es-*` in the config cannot be read: {message}. Correct them there.")


def examine_run(run: ExistingRun, wishes: Wishes) -> tuple[list[Finding], Proposal]:
    """Findings about one run, and what Evolved Sampling would do in it."""
    blocks = check_deepspeed if run.kind == "deepspeed" else check_blocks_in_yaml
    findings = [*blocks(run, wishes.config), *check(run, wishes.config)]
    sizes, more = measure(run)
    passes = passes_of(run, wishes.passes)
    proposal, told = propose(run, sizes, wishes.config, wishes.given, passes)
    found = findings + more + told
    if task_of(run) is not None or not was_read(run):  # nothing is fine about a run that is not known, or not ours
        found = [finding for finding in found if finding.severity != "OK"]
    return found, proposal
