"""Nothing that a checkpoint's files name is run, in no file of either backend, by whichever instruction it is named."""

from __future__ import annotations

import contextlib
import io
import pickle
import shutil
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from es_megatron.checkpoint import disk, sealed
from es_megatron.errors import CheckpointError
from es_megatron.frameworks.data_only import check_files, check_folder, check_metadata, data_only
from es_megatron.rank_grid import RankGrid
from tests import deepspeed_helper, small_run
from tests.ranks_helper import run_on_ranks

pytestmark = pytest.mark.timeout(300)  # seconds on an idle machine
STOP = 3


def attacks(marker: Path) -> dict[str, bytes]:
    """Pickles that make the folder `marker` when they are loaded."""
    name = str(marker)
    text = b"X" + len(name).to_bytes(4, "little") + name.encode()
    short = b"\x8c" + bytes([len(name)]) + name.encode()
    call = f"__import__('os').mkdir({name!r})"
    command = f"mkdir {name}"
    system = b"X" + len(command).to_bytes(4, "little") + command.encode()
    evaluated = b"X" + len(call).to_bytes(4, "little") + call.encode()
    torch_call = b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nmkdir\nctorch\nTensor\n(" + text + b"tNtR."
    return {
        "reduce": b"\x80\x02cos\nmkdir\n(" + text + b"tR.",
        "system": b"\x80\x02cposix\nsystem\n(" + system + b"tR.",
        "inst": b"(S" + repr(name).encode() + b"\nios\nmkdir\n.",
        "obj": b"(cos\nmkdir\n" + text + b"o.",
        "stack_global": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93(" + short + b"tR.",
        "dotted": b"\x80\x04\x8c\x05torch\x8c\x08os.mkdir\x93(" + short + b"tR.",
        "eval": b"\x80\x02cbuiltins\neval\n(" + evaluated + b"tR.",
        "old eval": b"\x80\x00c__builtin__\neval\n(" + evaluated + b"tR.",
        "torch's own": b"\x80\x02ctorch.utils.collect_env\nrun\n(" + system + b"tR.",
        "by torch's own": b"\x80\x02" + torch_call,
    }


KINDS = sorted(attacks(Path("x")))


def as_torch_file(pickled: bytes, like: Path) -> bytes:
    """A file of `torch.save` with another pickle in it."""
    out = io.BytesIO()
    with zipfile.ZipFile(like) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        for each in old.infolist():
            new.writestr(each, pickled if each.filename.endswith("/data.pkl") else old.read(each))
    return out.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_a_metadata_that_names_more_than_records_is_refused_before_anything_is_called(kind: str, tmp_path: Path):
    marker = tmp_path / "made"
    (tmp_path / ".metadata").write_bytes(attacks(marker)[kind])
    with pytest.raises(CheckpointError, match=r"\.metadata must hold data alone, but asks for"):
        check_metadata(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("wrapped", [True, False], ids=["zip", "bare"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_torch_that_names_more_than_tensors_is_refused_twice(kind: str, wrapped: bool, tmp_path: Path):
    """By a look at it, and where torch loads it, whatever the caller asks for."""
    path, marker = tmp_path / "common.pt", tmp_path / "made"
    torch.save({"a": torch.ones(2)}, path)
    pickled = attacks(marker)[kind]
    path.write_bytes(as_torch_file(pickled, path) if wrapped else pickled)
    with pytest.raises(CheckpointError, match=r"common\.pt"):
        check_files([path])
    for source in (path, str(path), io.BytesIO(path.read_bytes())):
        with pytest.raises((CheckpointError, RuntimeError)) as raised, data_only(tmp_path):
            torch.load(source, weights_only=False)
        assert isinstance(raised.value, CheckpointError) or not wrapped  # a bare pickle is no file of torch's at all
    assert not marker.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_each_attack_is_real(kind: str, tmp_path: Path):
    with contextlib.suppress(AttributeError, TypeError):  # of what comes after the call
        pickle.loads(attacks(tmp_path / "made")[kind])
    assert (tmp_path / "made").is_dir()


def test_the_user_allows_a_class_of_their_own(tmp_path: Path):
    torch.save({"a": Mine()}, tmp_path / "a.pt")
    with (
        pytest.raises(CheckpointError, match=r"a\.pt must hold data alone, but asks for `.*Mine`"),
        data_only(tmp_path),
    ):
        torch.load(tmp_path / "a.pt")
    with torch.serialization.safe_globals([Mine]), data_only(tmp_path):
        assert isinstance(torch.load(tmp_path / "a.pt")["a"], Mine)


class Mine:
    """What a user puts into a checkpoint."""


def test_a_checkpoint_of_torch_itself_is_data(tmp_path: Path):
    state = {
        "weight": torch.arange(6.0).reshape(2, 3),
        "step": 3,
        "nested": {"name": "a", "half": torch.ones(2).half()},
    }
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    check_metadata(tmp_path)
    loaded = {"weight": torch.zeros(2, 3), "step": 0, "nested": {"name": "", "half": torch.zeros(2).half()}}
    with data_only(tmp_path):
        dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    assert loaded["weight"].equal(state["weight"])
    assert (loaded["step"], loaded["nested"]["name"]) == (3, "a")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "link", ""])
def test_a_metadata_that_names_files_outside_its_folder_is_refused(name: str, tmp_path: Path):
    folder = tmp_path / "model"
    dcp.save({"weight": torch.ones(3)}, checkpoint_id=folder, no_dist=True)
    (tmp_path / "outside").write_bytes((folder / "__0_0.distcp").read_bytes())
    (folder / "link").symlink_to(tmp_path / "outside")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = name
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="must name files inside"):
        check_metadata(folder)


def test_one_bad_file_is_refused_on_all_ranks(tmp_path: Path):
    torch.save({"a": 1}, tmp_path / "a.pt")
    torch.save({"a": 1}, tmp_path / "b.pt")
    (tmp_path / "b.pt").write_bytes(as_torch_file(attacks(tmp_path / "made")["reduce"], tmp_path / "a.pt"))

    def told() -> str:
        with pytest.raises(CheckpointError) as raised:
            check_folder(tmp_path, RankGrid.data_parallel())
        return str(raised.value)

    first, second = run_on_ranks(2, told)
    assert first == second
    assert "b.pt must hold data alone, but asks for `os.mkdir`" in first


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_blend(tmp_path_factory.mktemp("blend"))


BACKENDS = {
    "megatron": ["parallel.distributed_optimizer=true"],
    "zero1": ["backend=deepspeed", "deepspeed.zero_stage=1"],
}


@pytest.fixture(scope="module", params=BACKENDS)
def saved(
    request: pytest.FixtureRequest, blend: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """A run's folder and its settings."""
    directory, options = tmp_path_factory.mktemp("run"), BACKENDS[request.param]
    deepspeed_helper.run(2, blend, directory, *options, stop_at=STOP)
    return directory, options


def seal_again(checkpoint: Path) -> None:
    """Write the checksums of what is there now, as somebody who forges a checkpoint would."""
    path = checkpoint / "checksums.json"
    document = sealed.read_sealed(path)
    for name in document["files"]:
        size, crc = disk.checksum_file(checkpoint / name)
        document["files"][name] = [size, sealed.format_crc(crc)]
    path.write_bytes(sealed.seal(document))


def test_no_file_of_a_forged_checkpoint_runs_anything(saved: tuple[Path, list[str]], blend: Path, tmp_path: Path):
    """Each file of a real one in turn holds an attack, its checksums sealed again; every rank refuses it."""
    directory, options = saved
    checkpoint, marker = directory / "checkpoints" / f"iter_{STOP:07d}", tmp_path / "made"
    settings = small_run.settings_of(blend, directory, *options)
    files = [path for path in (checkpoint / "model").rglob("*") if path.name.endswith((".pt", ".metadata"))]
    attack = attacks(marker)["reduce"]
    for path in sorted(files):
        before = path.read_bytes()
        path.write_bytes(as_torch_file(attack, path) if path.suffix == ".pt" else attack)
        seal_again(checkpoint)
        for told in run_on_ranks(2, message_of_resuming, settings, timeout=120):
            assert "must hold data alone, but asks for `os.mkdir`" in told
            assert path.name in told
        path.write_bytes(before)
    seal_again(checkpoint)
    assert not marker.exists()
    assert len(files) >= (1 if options == BACKENDS["megatron"] else 5)  # no `common.pt` since Megatron-Core 0.19


def test_no_object_in_a_shard_runs_anything(blend: Path, tmp_path: Path):
    """What Megatron-Core puts into shards beside tensors, such as random states, is a pickle of its own."""
    options, marker = BACKENDS["megatron"], tmp_path / "made"
    deepspeed_helper.run(2, blend, tmp_path / "run", *options, stop_at=STOP)
    checkpoint = tmp_path / "run" / "checkpoints" / f"iter_{STOP:07d}"
    metadata = pickle.loads((checkpoint / "model" / ".metadata").read_bytes())
    torch.save({}, tmp_path / "like.pt")
    attack = as_torch_file(attacks(marker)["reduce"], tmp_path / "like.pt")
    forged = [place for index, place in metadata.storage_data.items() if index.fqn.startswith("rng")]
    assert forged
    for place in forged:
        shard = checkpoint / "model" / place.relative_path
        place.offset, place.length = shard.stat().st_size, len(attack)
        shard.write_bytes(shard.read_bytes() + attack)
    (checkpoint / "model" / ".metadata").write_bytes(pickle.dumps(metadata))
    seal_again(checkpoint)
    for told in run_on_ranks(
        2, message_of_resuming, small_run.settings_of(blend, tmp_path / "run", *options), timeout=120
    ):
        assert "asks for `os.mkdir`" in told
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../../../outside", "/etc/hostname", "link"])
def test_checksums_of_files_outside_a_checkpoint_are_refused(
    name: str, saved: tuple[Path, list[str]], blend: Path, tmp_path: Path
):
    directory, options = saved
    shutil.copytree(directory, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / f"iter_{STOP:07d}"
    (tmp_path / "outside").write_bytes(b"x")
    (checkpoint / "link").symlink_to(tmp_path / "outside")
    document = sealed.read_sealed(checkpoint / "checksums.json")
    document["files"][name] = [1, sealed.format_crc(zlib.crc32(b"x"))]
    (checkpoint / "checksums.json").write_bytes(sealed.seal(document))
    settings = small_run.settings_of(blend, tmp_path / "run", *options)
    for told in run_on_ranks(2, message_of_resuming, settings):
        assert "must name files inside" in told


def message_of_resuming(settings: small_run.PretrainSettings) -> str:
    with pytest.raises(CheckpointError) as raised:
        small_run.train(settings)
    return str(raised.value)
