"""The small runs that faults are tried on: backends, presets, a reference; and what an undisturbed run of each does."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from es_megatron.frameworks import data_check, deepspeed_common, token_hash
from es_megatron.frameworks.megatron_data import load_blend
from es_megatron.trainer.settings import PretrainSettings, write_settings
from tests import reference_helper, small_run
from tests.faults.job import Job, Prepare, nothing

RANKS = 2
LIMIT = 60.0
"""Seconds in which all ranks end, once one of them has a reason to."""
RUN = 300.0
"""Seconds for a run from its start to its end, on a machine that does much else."""
EVERY = 2
"""Iterations between saves."""
SAVE = 4
"""Iteration of the save that faults are put into; the one before it is whole."""
FINISHED, FAILED, STOPPED = 0, 2, 3

SMALL = (
    *("model.num_layers=2", f"training.train_samples={10 * small_run.META_BATCH}", "training.log_interval=1"),
    *(f"run.save_interval={EVERY}", "run.keep_checkpoints=2"),
)
SIZES = {**small_run.SIZES, "d": 6000}
"""Rows of the components; the file of the last is larger than what its fingerprint samples."""
WEIGHTS = {"a": 0.5, "b": 0.25, "c": 0.05, "d": 0.2}
DEFAULT = ("evolved_sampling.preset=default",)
REFERENCE = (*DEFAULT, "evolved_sampling.selection.policy=reducible")


@dataclass(frozen=True)
class Setup:
    """One kind of run."""

    overrides: tuple[str, ...] = ()
    referenced: bool = False
    """Whether its policy needs a reference."""
    resizable: bool = True
    """Whether it goes on under another number of ranks without a conversion of half a minute."""

    @property
    def deepspeed(self) -> bool:
        """Whether it needs DeepSpeed."""
        return "backend=deepspeed" in self.overrides


SETUPS = {
    "megatron-paper": Setup(),
    "megatron-default": Setup(DEFAULT),
    "megatron-reference": Setup(REFERENCE, referenced=True),
    "megatron-background": Setup((*DEFAULT, "run.background_save=true")),
    "deepspeed-paper": Setup(("backend=deepspeed", "deepspeed.zero_stage=1"), resizable=False),
    "deepspeed-default": Setup((*DEFAULT, "backend=deepspeed", "deepspeed.zero_stage=0")),
}


def import_deepspeed() -> bool:
    """Import what a DeepSpeed run needs, for all forks to share; tells whether it is installed."""
    if importlib.util.find_spec("deepspeed") is None:
        return False
    deepspeed_common.prepare()
    for module in ("deepspeed_backend", "deepspeed_model"):
        importlib.import_module(f"es_megatron.trainer.{module}")
    return True


class Bench:
    """A folder with the data of a setup; its runs are made below it."""

    def __init__(self, name: str, folder: Path) -> None:
        """Write the data, unless they are there."""
        self.name, self.setup, self.folder = name, SETUPS[name], folder
        self.data = folder / "data"
        if not (self.data / "whole").exists():
            shutil.rmtree(self.data, ignore_errors=True)
            small_run.write_blend(self.data, SIZES, weights=WEIGHTS)
            blend = load_blend(self.data / "blend.yaml", small_run.T)
            for each in data_check.files_of(blend):
                token_hash.write_hash(each.file, token_hash.take_hash(each.file))
            manifest, loss = blend.manifest, np.random.default_rng(3).uniform(2, 5, blend.manifest.total)
            reference_helper.write_reference(self.data / "reference", manifest, loss)
            (self.data / "whole").touch()

    def settings(self, directory: Path, *more: str, data: Path | None = None) -> PretrainSettings:
        """Settings of a run in a folder."""
        reference = (f"evolved_sampling.reference.folder={self.data / 'reference'}",) if self.setup.referenced else ()
        blend = (data or self.data) / "blend.yaml"
        return small_run.settings_of(blend, directory, *SMALL, *self.setup.overrides, *reference, *more)

    def start(
        self,
        directory: Path,
        ranks: int = RANKS,
        prepare: Prepare = nothing,
        *,
        more: Sequence[str] = (),
        said: str = "",
    ) -> Job:
        """Start or go on with a run in a folder; what its ranks print is beside it, in a folder of its own."""
        output = directory.with_name(f"{directory.name}.said{said}")
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        path = output / "settings.yaml"
        write_settings(self.settings(directory, *more), path)
        return Job(ranks, ["pretrain", "--config", str(path)], output, prepare)

    def undisturbed(self, ranks: int = RANKS) -> Path:
        """Folder of a whole run on so many ranks that keeps all its checkpoints; made once."""
        directory = self.folder / f"undisturbed-{ranks}"
        if not (directory / "summary.json").exists():
            shutil.rmtree(directory, ignore_errors=True)
            job = self.start(directory, ranks, more=["run.keep_checkpoints=1000"])
            codes = job.codes(RUN)
            if codes != [FINISHED] * ranks:
                raise RuntimeError(f"the undisturbed run of {self.name} ended with {codes}:\n{job.said(0)[-3000:]}")
        return directory


def facts(directory: Path) -> dict[str, Any]:
    """What a finished run did, but for times: what it chose, its losses, and the scores that it leaves."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((directory / "summary.json").read_text())
    newest = directory / "checkpoints" / (directory / "checkpoints" / "latest").read_text().strip()
    return {
        "chosen": small_run.audit_of(directory),
        "losses": {line["iteration"]: line["lm_loss"] for line in lines if "lm_loss" in line},
        "trained": summary["sequences_trained"],
        "iterations": summary["iterations"],
        "scores": [path.read_bytes() for path in sorted(newest.glob("es_state/scores-*"))],
    }


def differences(directory: Path, expected: Path, *, exact: bool = True) -> str | None:
    """In what a finished run is not the undisturbed one; after other numbers of ranks only lengths are compared."""
    try:
        found, other = facts(directory), facts(expected)
    except (OSError, ValueError, KeyError, AssertionError) as error:
        return f"its files cannot be read: {error!r}"
    names = list(other) if exact else ["trained", "iterations"]
    unlike = [name for name in names if found[name] != other[name]]
    return f"differs from the undisturbed run in {', '.join(unlike)}" if unlike else None


def words_of(text: str) -> str | None:
    """What makes an output one that no user should see."""
    if "Traceback (most recent call last)" in text:
        return "a traceback: " + text.strip().splitlines()[-1]
    return None


def last_iteration(text: str) -> int:
    """The last iteration that a rank has logged, -1 before the first."""
    found = re.findall(r"iteration +(\d+)/", text)
    return int(found[-1]) if found else -1
