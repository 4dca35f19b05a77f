"""Checkpoints are read as data: nothing that their files name is run but what makes up tensors and plain values.

torch's own files are pickles, and a pickle may name any function and have it called. Upstream loads some without a
check: DeepSpeed's states, the objects in Megatron-Core's shards, the `.metadata` of a distributed checkpoint.
"""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.metadata import Metadata
from typing_extensions import override

from es_megatron.checkpoint.agreement import agreed
from es_megatron.checkpoint.sealed import file_inside
from es_megatron.errors import CheckpointError
from es_megatron.rank_grid import RankGrid

METADATA_GLOBALS = frozenset(
    {
        "collections.OrderedDict",
        "pathlib.PosixPath",
        "pathlib._local.PosixPath",
        "torch.Size",
        "torch.serialization._get_layout",
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.distributed.checkpoint.filesystem._StoragePrefix",
        *(
            f"torch.distributed.checkpoint.metadata.{name}"
            for name in (
                *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
                *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
            )
        ),
        *(
            f"torch.distributed.checkpoint.planner.{name}"
            for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
        ),
        *(f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    }
)
"""What a `.metadata` of torch and Megatron-Core is made of: records, whose fields are values, and types of tensors."""

DEEPSPEED_GLOBALS = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaleConfig",
    "deepspeed.runtime.fp16.loss_scaler.LossScaleProfile",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""What DeepSpeed's states hold beside tensors and plain values."""

NAMED = re.compile(r"(?:GLOBAL|function|class|operand)\s+([\w.]+)")
"""How torch's messages name what is not allowed."""


class MetadataReader(pickle.Unpickler):
    """Reads a `.metadata`; anything else that it names is an error before it is looked up."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        """Take the open file, and its path for messages."""
        super().__init__(file)
        self._path = path

    @override
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Look up what the pickle names, by whichever instruction it does."""
        if f"{module_name}.{global_name}" not in METADATA_GLOBALS:
            raise not_data(self._path, f"{module_name}.{global_name}")
        return super().find_class(module_name, global_name)


def check_metadata(folder: Path) -> None:
    """Refuse a distributed checkpoint whose `.metadata` is more than data, or names files outside the folder.

    Args:
        folder: of the checkpoint; without a `.metadata` nothing is refused.

    Raises:
        CheckpointError: names the file and what it names.
    """
    for path in sorted(folder.glob("*.metadata")):
        with path.open("rb") as file:
            try:
                found = MetadataReader(file, path).load()
            except CheckpointError:
                raise
            except Exception as error:  # whatever a damaged pickle brings about
                raise _damaged(path, error) from error
        if not isinstance(found, Metadata):
            raise _damaged(path, TypeError("no metadata of a distributed checkpoint"))
        for name in {getattr(place, "relative_path", None) for place in dict(found.storage_data or {}).values()}:
            file_inside(folder, name, path)


def check_files(files: Iterable[Path]) -> None:
    """Refuse files of `torch.save` that name more than tensors and plain values are made of; nothing is loaded.

    Raises:
        CheckpointError: names the file and what it names.
    """
    with torch.serialization.safe_globals(_deepspeed_types()):
        for path in files:
            try:
                named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            except OSError:
                raise
            except Exception as error:  # whatever a damaged file brings about
                raise _damaged(path, error) from error
            if named:
                raise not_data(path, min(named))


def check_folder(folder: Path, grid: RankGrid, pattern: str = "*.pt") -> None:
    """Check all files of `torch.save` below a folder, each on one rank; collective.

    Args:
        folder: of the checkpoint.
        grid: the ranks.
        pattern: names of the files that will be loaded.

    Raises:
        CheckpointError: on every rank; so none of them waits in a load that another has refused.
    """
    with agreed(grid, f"load {folder}"):
        files = sorted(folder.rglob(pattern))
        check_files(files[grid.world_rank :: grid.world_size])


@contextmanager
def data_only(folder: Path) -> Generator[None]:
    """Have `torch.load` read data alone in the body of a `with`, whoever calls it and whatever they ask for.

    It holds for all threads of the process. Classes that the user has allowed by `torch.serialization.add_safe_globals`
    are loaded.

    Args:
        folder: that is loaded, for messages.

    Raises:
        CheckpointError: a file names what is not allowed; it was not called.
    """
    own = torch.load

    def load(file: Any, *args: Any, **more: Any) -> Any:
        more["weights_only"] = True
        try:
            with torch.serialization.safe_globals(_deepspeed_types()):
                return own(file, *args, **more)
        except pickle.UnpicklingError as error:
            where = file if isinstance(file, str | Path) else getattr(file, "name", folder)
            named = NAMED.search(str(error).replace("Unsupported global: ", ""))
            raise not_data(Path(str(where)), named[1] if named else _brief(error)) from error

    torch.load = load
    try:
        yield
    finally:
        torch.load = own


def not_data(path: Path, named: str) -> CheckpointError:
    """The error of a file that asks for something to be called."""
    return CheckpointError(
        f"{path} must hold data alone, but asks for `{named}`, which was not called. Do not use a checkpoint that you "
        "did not make. If this one is yours and holds a class of your own, allow that class by "
        "`torch.serialization.add_safe_globals([...])` before loading."
    )


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} could not be loaded, it is damaged or of another kind: {type(error).__name__}: {_brief(error)}. "
        "Use an older checkpoint."
    )


def _deepspeed_types() -> list[Any]:
    """Those of `DEEPSPEED_GLOBALS` that this process has imported: without DeepSpeed there are none."""
    places = [name.rpartition(".") for name in DEEPSPEED_GLOBALS]
    found = [getattr(sys.modules.get(module), name, None) for module, _, name in places]
    return [each for each in found if each is not None]


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(" .")
