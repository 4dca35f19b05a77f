"""The flags that switch Evolved Sampling on, and the runner that starts a script with them."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from es_megatron.config import EvolvedSamplingConfig
from es_megatron.errors import ConfigError
from es_megatron.frameworks.arguments import add_arguments, check_flags, field_help, read_switches
from tests.es_config import es_config


def test_flags_are_the_fields_of_the_settings() -> None:
    parser = add_arguments(argparse.ArgumentParser())
    told = parser.format_help()
    for name in EvolvedSamplingConfig.__dataclass_fields__:
        assert f"--es-{name.replace('_', '-')}" in told
    assert set(field_help(EvolvedSamplingConfig)) == set(EvolvedSamplingConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], None),
        (["--es"], es_config()),
        (["--es-arm", "uniform"], es_config(arm="uniform")),
        (
            ["--es-scores-beta2", "0.7", "--es-selection-inclusion-weights", "--es-scorer-micro-batch-size", "8"],
            es_config(beta2=0.7, inclusion_weights=True, scoring_micro_batch_size=8),
        ),
        (["--no-es", "--es-scores-beta2", "0.7"], None),
        (["--es-strict-versions"], None),
    ],
)
def test_flags_switch_it_on(flags: list[str], expected: EvolvedSamplingConfig | None) -> None:
    arguments = add_arguments(argparse.ArgumentParser()).parse_args(flags)
    assert read_switches(arguments).config == expected
    if not flags:
        assert vars(arguments) == {}, "a run without the flags carries no trace of them into its checkpoints"


def test_wrong_values() -> None:
    parser = add_arguments(argparse.ArgumentParser(exit_on_error=False))
    with pytest.raises(argparse.ArgumentError, match="invalid choice: 'best'"):
        parser.parse_args(["--es-arm", "best"])
    with pytest.raises(ConfigError, match=r"`selection\.keep_ratio` must be in"):
        read_switches(parser.parse_args(["--es-selection-keep-ratio", "2"]))


def test_flags_that_look_like_ours_are_refused_before_the_script_runs() -> None:
    check_flags(["--es", "--es-selection-keep-ratio=0.25", "--no-es", "--es-keep-ratio", "0.5", "--es-sel", "--esq"])
    check_flags(["--es-of-the-script-alone", "--lr", "1", "es-pruning-rati"])
    for flag, meant in (
        ("--es-selection-keep-ration", "--es-selection-keep-ratio"),
        ("--es-prunning-ratio=0.2", "--es-pruning-ratio"),
        ("--no-es-selection-inclusion-weight-s", "--no-es-selection-inclusion-weights"),
    ):
        with pytest.raises(ConfigError, match=f"Unknown flag `{flag.partition('=')[0]}`. Did you mean `{meant}`"):
            check_flags(["--lr", "1", flag])


def test_runner_names_what_is_wrong(tmp_path: Path) -> None:
    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "es_megatron.run", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=tmp_path, check=False)

    done = start("no_such_script.py")
    assert done.returncode == 2
    assert "`no_such_script.py` must be a script, but there is no such file" in done.stderr
    assert "usage: python -m es_megatron.run SCRIPT.py" in start("--help").stdout
