"""What the folder of a run tells without a model: its blend, checkpoints, and what it trained on when."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from es_megatron.algorithm.evolution import usable_scores
from es_megatron.checkpoint.compatibility import list_differences
from es_megatron.checkpoint.es_state import Reader, read_manifest
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.core.skipped import ids_of
from es_megatron.data.manifest import Manifest
from es_megatron.data.mask import KeptMask
from es_megatron.data.ramp import Ramp, Stage
from es_megatron.data.sampler import Sampler
from es_megatron.data.schedule import Origin, Schedule
from es_megatron.errors import ConfigError, DataError
from es_megatron.frameworks.megatron_data import OneEpochDataset, load_blend, open_component
from es_megatron.score_files.files import ScoreFiles
from es_megatron.scoring.arms import prunes
from es_megatron.trainer.settings import SETTINGS, PretrainSettings, load_settings

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]

AUDIT = "audit.jsonl"
CURE = "A run with `run.audit=true` (`--es-audit` elsewhere) notes what every iteration trains on."
NUMBER = re.compile(r'\{"iteration": (\d+)[,}]')


class Trained(NamedTuple):
    """What an iteration trained on."""

    ids: Int64
    loss: Float32
    """Of each, inf where it was not finite; nan where the audit does not tell."""
    norm: float
    """Of the gradients before clipping; nan where the audit does not tell."""


class RunFiles:
    """The folder of a run of `es-megatron pretrain`, or one that Megatron-LM saves checkpoints into."""

    def __init__(self, path: Path) -> None:
        """Look at what is there; raises `DataError` if the folder is not that of a run."""
        self.path, own = path, path / SETTINGS
        self.settings: PretrainSettings | None = load_settings(own) if own.is_file() else None
        """None where `es-megatron pretrain` did not make it."""
        found = [each for each in (*path.glob("checkpoints/iter_*"), *path.glob("iter_*")) if each.suffix == ""]
        complete = sorted(each for each in found if (each / "es_state" / "manifest.json").is_file())
        self.checkpoints = {int(each.name.removeprefix("iter_")): each for each in complete}
        """By iterations that were run, rising."""
        if self.settings is None and not self.checkpoints:
            raise DataError(
                f"`{path}` must be the folder of a run, with its `{SETTINGS}` or with checkpoints that have an "
                "`es_state`, but is not. Name `run.directory`, or the folder of `--save`."
            )

    def manifest(self, checkpoint: int | None) -> Manifest:
        """The blend of a checkpoint; without one, of the settings."""
        if checkpoint is not None:
            return ScoreFiles(self.checkpoints[checkpoint]).manifest
        assert self.settings is not None  # one of the two is there
        return load_blend(self.settings.data.blend, self.settings.model.seq_length).manifest

    @property
    def newest(self) -> int | None:
        """The newest checkpoint."""
        return max(self.checkpoints, default=None)

    def finished(self, iteration: int) -> int:
        """Iterations before one of the audit, which counts from 1 in Megatron-LM."""
        return iteration - (self.settings is None)

    def around(self, iteration: int) -> tuple[int | None, int | None]:
        """The newest checkpoint without an iteration, and the oldest one with it."""
        before = [each for each in self.checkpoints if each <= self.finished(iteration)]
        after = [each for each in self.checkpoints if each > self.finished(iteration)]
        return max(before, default=None), min(after, default=None)


def read_audit(path: Path, first: int, last: int) -> dict[int, Trained]:
    """The iterations of an audit from `first` to `last`; the others' lines are passed over unread.

    Raises:
        DataError: it cannot be read.
    """
    found: dict[int, Trained] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                number = NUMBER.match(line)
                if number is None or not first <= int(number[1]) <= last or not line.endswith("\n"):
                    continue
                content = json.loads(line)
                ids = np.asarray(content["chosen"], np.int64)
                told = content.get("loss", [np.nan] * len(ids))
                loss = np.asarray([np.inf if each is None else each for each in told], np.float32)
                found[int(number[1])] = Trained(ids, loss, float(content.get("norm", np.nan)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"`{path}` must be the audit of a run, but cannot be read: {error}. Name another.") from error
    return found


@functools.cache
def dataset_of(manifest: Manifest, name: str) -> OneEpochDataset | None:
    """The tokens of a component; None where its files are not there any more, or are others."""
    saved = next(each for each in manifest.components if each.name == name)
    try:
        now, dataset = open_component(name, saved.prefix, manifest.seq_length)
    except (DataError, OSError):
        return None
    return dataset if now.fingerprint == saved.fingerprint else None


def drawn_rows(run: RunFiles, iteration: int) -> Int64:
    """Ids that an iteration drew, found anew by the terms and kept masks of the checkpoints around it.

    Raises:
        DataError: there is none, or none with the masks of that iteration; names the setting that would have told.
    """
    folders = [run.checkpoints[each] for each in run.around(iteration) if each is not None]
    if not folders:
        raise DataError(f"`{run.path}` has no line of iteration {iteration} in an audit, and no checkpoint. {CURE}")
    files = ScoreFiles(folders[-1])
    engine, manifest = files.state["engine"], files.manifest
    terms, size = engine["terms"], engine["terms"]["meta_batch"]
    pruning = {"ratio": terms["pruning_ratio"]}
    schedule = Schedule(
        manifest,
        size,
        terms["train_samples"],
        anneal=terms["anneal"],
        pruning_ratio=terms["pruning_ratio"]
        if prunes(EvolvedSamplingConfig.from_mapping({"arm": terms["arm"], "pruning": pruning}))
        else 0.0,
        origin=Origin.from_json(engine["origin"]),
        ramp=Ramp(size, tuple(Stage(*each) for each in terms.get("ramp", []))),
    )
    sampler = Sampler(schedule, terms["seed"])
    sampler.skipped = ids_of(engine.get("skipped", {}), manifest)
    for folder in folders:
        reader = Reader(folder / "es_state", read_manifest(folder / "es_state"))
        masks = reader.read_masks().items()
        sampler.masks |= {key: KeptMask(packed, manifest.components[key[0]].samples) for key, packed in masks}
        reader.close()
    try:
        if schedule.origin.iteration <= run.finished(iteration) < schedule.iterations:
            return sampler.batch(run.finished(iteration)).id
    except ConfigError:  # of a pruned epoch whose kept mask is in neither checkpoint
        pass
    raise DataError(f"What iteration {iteration} drew cannot be told by the checkpoints of `{run.path}`. {CURE}")


def history_at(folder: Path, manifest: Manifest, ids: Int64) -> tuple[Float32, UInt8]:
    """Mean loss of rows in a checkpoint, the newest counting most, and visits; none if it is of another blend.

    That is the stored score without its start value, nan without a visit.
    """
    files = ScoreFiles(folder)
    if list_differences(files.manifest.to_json(), manifest.to_json()):
        return np.full(len(ids), np.nan, np.float32), np.zeros(len(ids), np.uint8)
    document = read_manifest(files.folder)
    reader, bounds = Reader(files.folder, document), np.asarray(document["shard_bounds"])
    score, visits = np.empty(len(ids), np.float32), np.empty(len(ids), np.uint8)
    shard = np.searchsorted(bounds, ids, side="right") - 1
    for number in np.unique(shard).tolist():
        low, high = bounds[number : number + 2].tolist()
        here = shard == number
        for kind, target in (("score", score), ("visits", visits)):
            whole = np.empty(high - low, target.dtype)
            reader.read_range(kind, whole, low)
            target[here] = whole[ids[here] - low]
    reader.close()
    decay = float(files.state["engine"]["terms"]["decay"])
    return usable_scores(score, visits, decay, 1.0 / manifest.total, "debiased", np.nan), visits
