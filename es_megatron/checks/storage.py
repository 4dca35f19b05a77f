"""Whether the data of a run open, and whether its checkpoint folder can be written and belongs to them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from es_megatron.checkpoint.compatibility import list_differences
from es_megatron.checkpoint.es_state import read_manifest
from es_megatron.checks.findings import Finding, fail, note, ok, split_error
from es_megatron.errors import EsError

if TYPE_CHECKING:
    from es_megatron.frameworks.megatron_data import LoadedBlend

SPARE_BYTES = 1 << 30
BYTES_PER_SAMPLE = 5
"""Of a checkpoint's scores: a float32 and a count of visits."""


def check_data(path: Path | None, seq_length: int) -> tuple[LoadedBlend | None, list[Finding]]:
    """Open a blend with every file of it.

    Args:
        path: blend file, None if it is not to be looked at.
        seq_length: tokens in a sample.

    Returns:
        The blend, None if it was not opened, and a finding per component.
    """
    if path is None:
        return None, [note("data", "not checked", "give `--blend FILE`")]
    from es_megatron.frameworks.megatron_data import load_blend  # imports torch

    try:
        blend = load_blend(path, seq_length)
    except EsError as error:
        return None, [fail("data", *split_error(error, "correct the blend file"))]
    length = f"{seq_length} tokens"
    findings = [
        ok(f"data {each.name}", f"{each.samples:,} samples of {length}, fingerprint {each.fingerprint[:16]}")
        for each in blend.manifest.components
    ]
    return blend, findings


def check_hashes(blend: LoadedBlend | None, *, read: bool) -> Iterator[Finding]:
    """Whether the files of a blend are what the hashes beside them say, byte for byte.

    Args:
        blend: of the run, None if it was not opened.
        read: read the files; else only tell which have a hash. Sizes and token ids were compared at opening.
    """
    if blend is None:
        return
    from es_megatron.frameworks.data_check import files_of, verify  # imports torch
    from es_megatron.frameworks.token_hash import hash_path

    for each in files_of(blend):
        what = f"hash {each.name}"
        cure = f"`es-megatron hash {each.file.prefix}` writes one"
        try:
            known = verify(each) if read else hash_path(each.file.prefix).exists()
        except EsError as error:
            yield fail(what, *split_error(error, "copy or prepare the component again"))
            continue
        if not known:
            yield note(what, "none beside its files, so that a change of them may go unseen", cure)
        elif read:
            yield ok(what, f"all {each.file.tokens * each.file.dtype.itemsize / 1e9:.3f} GB are what it says")
        else:
            yield note(what, "not compared", "`--hash` reads all files")


def check_checkpoint(folder: Path | None, blend: LoadedBlend | None) -> Iterator[Finding]:
    """Whether checkpoints can be written, how much fits, and whether the newest scores belong to the data."""
    if folder is None:
        yield note("checkpoint", "not checked", "give `--checkpoint DIR`")
        return
    place = next((each for each in (folder, *folder.parents) if each.exists()), Path("/"))
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor.") as file:
            file.write(b"es_megatron")
            file.flush()
            os.fsync(file.fileno())  # network file systems may tell only here
    except OSError as error:
        told = f"`{place}` cannot be written ({error.strerror})"
        yield fail("checkpoint", told, "choose another folder, or its owner")
        return
    newest = newest_checkpoint(folder)
    yield judge_space(folder, shutil.disk_usage(place).free, newest, blend)
    if newest is not None:
        yield judge_scores(newest, blend)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest `iter_*` folder with scores in it."""
    found = sorted(folder.glob("iter_*/es_state/manifest.json")) if folder.is_dir() else []
    return found[-1].parents[1] if found else None


def judge_space(folder: Path, free: int, newest: Path | None, blend: LoadedBlend | None) -> Finding:
    """Whether the next checkpoint fits, beside the ones that are there.

    Args:
        folder: that checkpoints go to.
        free: bytes on its disk.
        newest: the newest checkpoint, whose size the next one has; None if there is none.
        blend: of the run, whose scores are counted where there is no checkpoint yet.
    """
    told = f"`{folder}` can be written, {free / 1e9:.1f} GB free"
    if newest is None:
        needed = BYTES_PER_SAMPLE * blend.manifest.total if blend is not None else 0
    else:
        needed = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
        told += f", one checkpoint takes {needed / 1e9:.3f} GB"
    if free < needed + SPARE_BYTES:
        return fail("checkpoint", told, "make room, or choose another disk")
    return ok("checkpoint", told)


def judge_scores(newest: Path, blend: LoadedBlend | None) -> Finding:
    """Whether scores that are there are whole, and belong to the blend."""
    what = f"scores {newest.name}"
    try:
        document = read_manifest(newest / "es_state")
    except EsError as error:
        return fail(what, str(error).rstrip("."), "remove this checkpoint; the one before it is used")
    samples = f"{document['samples']:,} samples"
    if blend is None:
        return ok(what, f"{samples}; not compared with data")
    differences = list_differences(document["data_manifest"], blend.manifest.to_json())
    if differences:
        return fail(what, "; ".join(differences), "go on with the data they were made with, or in another folder")
    return ok(what, f"{samples}, of this data")
