"""The full hash beside token files: any change is noticed, and token ids are held against the vocabulary."""

from __future__ import annotations

import argparse
import json
import os
import struct
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from es_megatron.checkpoint.compatibility import list_differences
from es_megatron.checks import storage
from es_megatron.config import EvolvedSamplingConfig
from es_megatron.errors import ConfigError, DataError
from es_megatron.frameworks import data_check, front_door, token_hash
from es_megatron.frameworks.data_check import DataCheck, DataFile, check_behind, check_components, verify
from es_megatron.frameworks.handle import Handle
from es_megatron.frameworks.megatron_data import LoadedBlend, load_blend, open_token_file
from es_megatron.frameworks.token_hash import hash_path, read_hash, take_hash, write_hash
from es_megatron.prepare import hashing
from es_megatron.rank_grid import RankGrid

LENGTH, VOCABULARY = 8, 600
CODES = {"int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def write_tokens(prefix: Path, ids: Any, dtype: str = "uint16") -> Path:
    """One document of some ids, as Megatron writes it."""
    tokens = np.asarray(ids, dtype)
    Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
    head = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, CODES[dtype], 1, 2)
    Path(f"{prefix}.idx").write_bytes(head + struct.pack("<iqqq", len(tokens), 0, 0, 1))
    return prefix


def make_blend(folder: Path, count: int = 100_000) -> Path:
    """Two components; `a` has a hash beside it."""
    random = np.random.default_rng(0)
    entries = [
        {"name": name, "train": str(write_tokens(folder / name, random.integers(0, 500, count)))} for name in "ab"
    ]
    file = open_token_file(folder / "a")
    write_hash(file, take_hash(file))
    path = folder / "blend.yaml"
    path.write_text(yaml.safe_dump({"vocab_size": VOCABULARY, "components": entries}))
    return path


def change(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def asked(*prefixes: str, blend: Path | None = None, renew: bool = False) -> argparse.Namespace:
    return argparse.Namespace(prefixes=list(prefixes), blend=blend, renew=renew)


@pytest.mark.parametrize("dtype", CODES)
def test_a_pass_over_blocks_of_any_size_finds_the_ends(tmp_path: Path, dtype: str, monkeypatch: Any) -> None:
    ids = np.random.default_rng(1).integers(3, 120, 10_000)
    file = open_token_file(write_tokens(tmp_path / "a", ids, dtype))
    whole = take_hash(file)
    assert (whole.lowest, whole.highest) == (ids.min(), ids.max())
    assert whole.bin_bytes == file.bin_path.stat().st_size
    for block in (8, 64, 4096):
        monkeypatch.setattr(token_hash, "_BLOCK", block)
        assert take_hash(file) == whole


def test_any_byte_that_changes_is_noticed(tmp_path: Path) -> None:
    make_blend(tmp_path)
    file = open_token_file(tmp_path / "a")
    each = DataFile("a", file, VOCABULARY)
    assert verify(each)
    for at in np.random.default_rng(2).integers(0, 200_000, 40).tolist():
        change(file.bin_path, at)
        with pytest.raises(DataError, match=r"a.bin` is not the file it was when .*es-megatron hash --renew"):
            verify(each)
        change(file.bin_path, at)
    change(file.idx_path, 20)  # of the number of sequences
    with pytest.raises(DataError, match=r"a.idx` is not the file it was"):
        verify(each)


def test_sizes_are_compared_when_a_blend_is_opened(tmp_path: Path) -> None:
    blend = make_blend(tmp_path)
    write_tokens(tmp_path / "a", np.zeros(50_000))
    with pytest.raises(DataError, match=r"a.bin` is not the file it was .* 100000 bytes instead of 200000"):
        load_blend(blend, LENGTH)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"format": 1}', "old"])
def test_a_hash_that_is_none_is_named(tmp_path: Path, content: Any) -> None:
    blend = make_blend(tmp_path)
    path = hash_path(tmp_path / "a")
    told = json.loads(path.read_bytes())
    path.write_bytes(json.dumps({**told, "bin_bytes": "200000"}).encode() if content == "old" else content)
    with pytest.raises(DataError, match=r"a.hash.json` is no hash of token files, or is damaged: .*--renew"):
        load_blend(blend, LENGTH)


def test_ids_beyond_the_vocabulary_are_found_before_any_pass(tmp_path: Path) -> None:
    blend = make_blend(tmp_path)
    for ids, dtype in ((np.r_[np.full(19_000, 5), np.full(100, 70_000)], "int32"), (np.r_[5:500, -3], "int16")):
        file = open_token_file(write_tokens(tmp_path / "a", ids, dtype))
        write_hash(file, take_hash(file))
        with pytest.raises(DataError, match=rf"`a` must be in \[0, 600\), but .*a.bin` has {ids.min()} .. {ids.max()}"):
            load_blend(blend, LENGTH)


def test_the_hash_is_part_of_what_scores_belong_to(tmp_path: Path) -> None:
    blend = make_blend(tmp_path)
    before = load_blend(blend, LENGTH).manifest
    change(tmp_path / "a.bin", 7_001)  # between the blocks that the fingerprint samples
    change(tmp_path / "b.bin", 7_001)
    assert load_blend(blend, LENGTH).manifest == before, "nobody has looked"
    assert hashing.run_hash(asked(str(tmp_path / "a"), str(tmp_path / "b.bin"), renew=True)) == 0
    now = load_blend(blend, LENGTH).manifest
    assert [each.fingerprint for each in now.components] == [each.fingerprint for each in before.components]
    (told,) = list_differences(before.to_json(), now.to_json())
    assert told.startswith("component `a` changed: `content` was ")
    assert not now.components[0].same_content(before.components[0])
    assert now.components[1].same_content(before.components[1]), "one of them is not known"


def test_the_command_writes_compares_and_renews(tmp_path: Path, capsys: Any) -> None:
    blend = make_blend(tmp_path)
    assert hashing.run_hash(asked(blend=blend)) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith(f"{tmp_path}/a.hash.json: agrees; token ids 0 .. 499, 0.000 GB")
    assert told[1].startswith(f"{tmp_path}/b.hash.json: written; token ids 0 .. 499, 0.000 GB")
    change(tmp_path / "b.bin", 0)
    with pytest.raises(DataError, match=r"b.bin` is not the file it was"):
        hashing.run_hash(asked(blend=blend))
    assert hashing.run_hash(asked(str(tmp_path / "b"), renew=True)) == 0
    assert hashing.run_hash(asked(blend=blend)) == 0
    write_tokens(tmp_path / "b", np.full(1000, 601))
    with pytest.raises(DataError, match=r"must be in \[0, 600\)"):
        hashing.run_hash(asked(blend=blend, renew=True))
    with pytest.raises(ConfigError, match="`PREFIX` or `--blend` must be given"):
        hashing.run_hash(asked())


def test_the_doctor_tells_what_has_no_hash_and_reads_when_asked(tmp_path: Path) -> None:
    blend = load_blend(make_blend(tmp_path), LENGTH)

    def found(*, read: bool) -> dict[str, str]:
        return {each.what: each.line() for each in storage.check_hashes(blend, read=read)}

    assert found(read=False)["hash a"] == "NOTE    hash a: not compared. Cure: `--hash` reads all files."
    assert "`es-megatron hash" in found(read=False)["hash b"]
    assert found(read=True)["hash a"].startswith("OK")
    change(tmp_path / "a.bin", 7_001)
    assert found(read=True)["hash a"].startswith("FAIL    hash a: `")
    assert list(storage.check_hashes(None, read=True)) == []


def check(blend: LoadedBlend) -> DataCheck:
    return check_behind(blend, RankGrid.alone(), wanted=True)


def test_a_change_is_raised_in_the_main_thread(tmp_path: Path) -> None:
    blend = load_blend(make_blend(tmp_path), LENGTH)
    check(blend).agree(60)
    change(tmp_path / "a.bin", 7_001)
    with pytest.raises(DataError, match=r"a.bin` is not the file it was"):
        check(blend).agree(60)
    check_behind(blend, RankGrid.alone(), wanted=False).agree(60)
    with pytest.raises(DataError, match=r"a.bin` is not the file it was"):
        check_components(blend.manifest, VOCABULARY, RankGrid.alone(), wanted=True).agree(60)
    check_components(blend.manifest, VOCABULARY, RankGrid.alone(), wanted=False).agree(60)


def test_ids_of_files_without_a_hash_are_found_too(tmp_path: Path) -> None:
    path = make_blend(tmp_path)
    write_tokens(tmp_path / "b", np.r_[np.full(5_000, 1), 70_000], "int32")
    with pytest.raises(DataError, match=r"`b` must be in \[0, 600\)"):
        check(load_blend(path, LENGTH)).agree(60)


def test_what_goes_wrong_while_reading_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    blend = load_blend(make_blend(tmp_path), LENGTH)
    (tmp_path / "b.bin").unlink()
    with pytest.raises(DataError, match=r"b.bin` cannot be read"):
        check(blend).agree(60)

    def fail(*_: Any) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(data_check, "verify", fail)
    with pytest.raises(DataError, match=r"cannot be read .MemoryError: no more"):
        check(blend).agree(60)


def test_the_pass_has_low_priority_and_leaves_off_when_told(tmp_path: Path, monkeypatch: Any) -> None:
    blend = load_blend(make_blend(tmp_path), LENGTH)
    inside, go_on, seen = threading.Event(), threading.Event(), []

    def slow(each: DataFile, report: Any) -> None:
        seen.append((each.name, os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
        inside.set()
        go_on.wait(60)
        report(1)

    monkeypatch.setattr(data_check, "verify", slow)
    running = check(blend)
    assert inside.wait(60)
    running.agree()  # does not wait
    running.close()
    go_on.set()
    running.agree(60)
    assert seen == [("a", 19)]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < 19


def test_attach_and_save_look_at_the_data(tmp_path: Path, monkeypatch: Any) -> None:
    blend = load_blend(make_blend(tmp_path), LENGTH)
    engine = SimpleNamespace(grid=RankGrid.alone(), config=EvolvedSamplingConfig(), save=lambda folder: folder)
    handle = Handle(engine, None, 0)  # type: ignore[arg-type]
    monkeypatch.setattr(front_door, "_attach", lambda *_: (handle, (1, 1)))
    assert front_door.attach(None, blend, train_samples=1, show_plan=False).save("here") == "here"
    monkeypatch.setattr(data_check, "FIRST_SECONDS", 0.0)
    go_on = threading.Event()
    monkeypatch.setattr(data_check, "verify", lambda *given: go_on.wait(60) and verify(*given))
    change(tmp_path / "a.bin", 7_001)
    front_door.attach(None, blend, train_samples=1, show_plan=False).save("here")
    assert handle.data is not None
    go_on.set()
    assert handle.data._done.wait(60)
    with pytest.raises(DataError, match=r"a.bin` is not the file it was"):
        handle.save("here")


def test_what_is_read_back_is_what_was_written(tmp_path: Path) -> None:
    file = open_token_file(write_tokens(tmp_path / "a", range(100)))
    assert read_hash(file) is None
    found = take_hash(file)
    write_hash(file, found)
    assert read_hash(file) == found
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
