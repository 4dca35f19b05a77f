"""What a sample must look like, and what a model must give for it; datasets of one's own as a blend. torch only.

A sample has `tokens` `[T]`, `labels` `[T]` where `labels[t]` is the token after `tokens[t]`, `loss_mask` `[T]` and
`position_ids` `[T]`. Other spellings are put right here: `input_ids` for `tokens`, `labels` of -100 for a mask, missing
positions, labels that are not shifted yet, samples that are shorter than T. Shape suffixes: B sequences of a
micro-batch, T tokens of a sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from es_megatron.data.manifest import Component, Manifest
from es_megatron.errors import ConfigError, DataError

IGNORED = -100
"""Label of a token that does not count, as in torch and Hugging Face's libraries."""

Sample = dict[str, Tensor]
Collate = Callable[[list[Any]], Mapping[str, Any]]

_PROBES = 16
_PADS = {"labels": IGNORED}


class MapStyle(Protocol):
    """A dataset with a length, whose items can be read in any order."""

    def __len__(self) -> int:
        """Number of items."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """Read an item; the same one each time."""
        ...


class MicroBatch(dict[str, Tensor]):
    """Tensors of a micro-batch by name; `input_ids` is `tokens`, and a name that is not there is told with the cure."""

    def __missing__(self, name: str) -> Tensor:
        """Find a name that stands under another one."""
        if name == "input_ids":
            return self["tokens"]
        raise DataError(
            f"`token_losses` or `pack` asks a micro-batch for `{name}`, but samples have {sorted(self)} (and "
            f"`input_ids`, which is `tokens`). Put `{name}` into the samples, or ask for one of these."
        )


class Samples(Dataset[Sample]):
    """Rows with every sample put into one form; picklable if the rows are, for loader workers."""

    def __init__(
        self, rows: Any, seq_length: int, *, collate: Collate | None = None, shift_labels: bool = False
    ) -> None:
        """Read nothing yet.

        Args:
            rows: samples by id, in any of the spellings.
            seq_length: T; shorter samples are padded to it at their end.
            collate: makes tensors `[1, n]` of a list with one item of `rows`, such as a data collator of Hugging
                Face's; it sees one item at a time, so that a sample is the same on whichever rank it is read.
            shift_labels: labels stand under their own tokens, as Hugging Face's models take them, or are missing.
        """
        self._rows, self._length = rows, seq_length
        self._collate, self._shift = collate, shift_labels

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    @override
    def __getitem__(self, index: int) -> Sample:
        """Read one sample: `tokens`, `labels`, `loss_mask`, `position_ids`, and what else it has, `[T]`.

        Raises:
            DataError: it is none, or is too long.
        """
        item = self._rows[index]
        if self._collate is not None:
            item = {name: first_of(name, value) for name, value in self._collate([item]).items()}
        return completed(item, self._length, f"row {index}", shift_labels=self._shift)


def first_of(name: str, value: Any) -> Any:
    """The only sequence of a batch of one.

    Raises:
        DataError: it is none.
    """
    if isinstance(value, Tensor) and value.dim() > 0 and len(value) == 1:
        return value[0]
    raise DataError(
        f"`collate` must make tensors [1, n] of a list with one item, but makes {shape_of(value)} of `{name}` instead. "
        "Use one that adds a first dimension, such as Hugging Face's data collators."
    )


def completed(item: Any, seq_length: int, where: str, *, shift_labels: bool = False) -> Sample:
    """Put a sample into the form that this module's head describes.

    Args:
        item: names and sequences: tensors, arrays or lists. What is no sequence of numbers is left out.
        seq_length: T.
        where: names the sample in errors.
        shift_labels: see `Samples`.

    Raises:
        DataError: names are missing, lengths differ, it is too long, or labels are not those of the next tokens.
    """
    found = {name: tensor for name, value in named(item, where).items() if (tensor := tensor_of(value)) is not None}
    if "tokens" not in found and "input_ids" in found:
        found["tokens"] = found.pop("input_ids")
    needed = ["tokens"] if shift_labels else ["tokens", "labels"]
    if missing := [name for name in needed if name not in found]:
        raise DataError(
            f"A sample must have `tokens` (or `input_ids`) and `labels`, but {where} has {sorted(found)} and no "
            f"`{missing[0]}`. Add it; `labels[t]` is the token after `tokens[t]`. Where labels are those of the tokens "
            "themselves, or missing, as in Hugging Face's datasets, use `blend_of(..., shift_labels=True)`."
        )
    found |= {name: found[name].to(torch.int64) for name in ("tokens", "labels") if name in found}
    tokens = found["tokens"]
    if tokens.dim() != 1 or not 1 <= len(tokens) <= seq_length:
        raise DataError(
            f"`tokens` of {where} must have the shape [T] with T at most {seq_length}, the `seq_length` of the blend, "
            f"but have {list(tokens.shape)} instead. Cut or pack the text to that length beforehand."
        )
    if shift_labels:
        found["labels"] = shifted(found)
    for name in ("labels", "loss_mask", "position_ids"):
        if name in found and found[name].shape != tokens.shape:
            raise DataError(
                f"`{name}` of {where} must have the shape of its tokens, {list(tokens.shape)}, but has "
                f"{list(found[name].shape)} instead. Give one for each token; -100 as a label masks it."
            )
    labels = found["labels"]
    if not shift_labels:
        check_shifted(tokens, labels, where)
    counted = (labels != IGNORED).to(torch.float32)
    found["loss_mask"] = found["loss_mask"].to(torch.float32) * counted if "loss_mask" in found else counted
    found.setdefault("position_ids", torch.arange(len(tokens)))
    return found if len(tokens) == seq_length else padded_to(found, seq_length)


def named(item: Any, where: str) -> Mapping[str, Any]:
    """A sample as names and values.

    Raises:
        DataError: it is something else.
    """
    if isinstance(item, Mapping):
        return cast(Mapping[str, Any], item)
    raise DataError(
        f"A sample must be a mapping of names to sequences, `tokens` and `labels` among them, but {where} is "
        f"{type(item).__name__} instead. Give `blend_of` a `collate` that makes one of it."
    )


def tensor_of(value: Any) -> Tensor | None:
    """A sequence of numbers as a tensor, None of anything else."""
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            return None
    return value if value.dim() > 0 else None


def shifted(sample: Mapping[str, Tensor]) -> Tensor:
    """Labels of the next tokens, of labels of the tokens themselves: int64 `[T]`, the last of them ignored."""
    tokens = sample["tokens"]
    labels = sample.get("labels")
    if labels is None:
        real = sample.get("attention_mask")
        labels = tokens if real is None else tokens.masked_fill(real == 0, IGNORED)
    return torch.cat([labels[1:], labels.new_full((1,), IGNORED)])


def check_shifted(tokens: Tensor, labels: Tensor, where: str) -> None:
    """Refuse labels that are the tokens themselves: a model that sees token t would be trained to say token t.

    Raises:
        DataError: they are.
    """
    counted = labels != IGNORED
    same = bool(((labels == tokens) | ~counted).all())
    if same and len(torch.unique(tokens[counted])) > 1:
        raise DataError(
            f"`labels` of {where} are its own tokens, but `labels[t]` must be the token after `tokens[t]`. Shift them "
            "by one, or use `blend_of(..., shift_labels=True)`, which does."
        )


def padded_to(sample: Sample, seq_length: int) -> Sample:
    """The same with T tokens: what is added at the end counts for nothing."""
    length = len(sample["tokens"])
    more = seq_length - length
    found: Sample = {}
    for name, tensor in sample.items():
        fits = tensor.dim() == 1 and len(tensor) == length
        found[name] = torch.nn.functional.pad(tensor, (0, more), value=_PADS.get(name, 0)) if fits else tensor
    return found


def checked_losses(found: Any, mask_BT: Tensor) -> Tensor:
    """What `token_losses` gave, if it is the loss of each token.

    Args:
        found: of the caller's function.
        mask_BT: the loss mask.

    Raises:
        ConfigError: it is something else.
    """
    shape = list(mask_BT.shape)
    if isinstance(found, Tensor) and list(found.shape) == shape:
        return found
    if hasattr(found, "logits"):
        cure = "it gives a model's output: pass `token_losses=huggingface_token_losses`, or `logits_token_losses`"
    elif isinstance(found, Tensor) and found.dim() == 0:
        cure = 'a mean over the batch does not say which sequence to choose: use `reduction="none"` and no mean'
    elif isinstance(found, Tensor) and found.numel() == mask_BT.numel():
        cure = "give them the shape of the labels: `losses.view(labels.shape)`"
    elif isinstance(found, Tensor) and found.dim() == 2 and found.shape[1] == mask_BT.shape[1] - 1:
        cure = "labels are those of the next tokens already: do not shift them, or logits, again"
    else:
        cure = "give one loss for each label, with those of masked ones in it"
    raise ConfigError(
        f"`token_losses` must give the loss of each token, a tensor [B, T] = {shape}, but gives {shape_of(found)} "
        f"instead: {cure}."
    )


def shape_of(value: Any) -> str:
    """Shape of a tensor, type of anything else."""
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


@dataclass(frozen=True)
class OwnBlend:
    """Datasets of one's own as a blend; `blend_of` makes it."""

    manifest: Manifest
    """Components and their sizes."""
    rows: Samples
    """Samples by id."""


class Joined:
    """Items of several datasets behind one id: that of the manifest."""

    def __init__(self, manifest: Manifest, datasets: Sequence[MapStyle]) -> None:
        """Take them in the order of the manifest's components."""
        self._manifest, self._datasets = manifest, tuple(datasets)

    def __len__(self) -> int:
        """Number of samples of the blend."""
        return self._manifest.total

    def __getitem__(self, sample_id: int) -> Any:
        """Read the item of an id."""
        component, row = self._manifest.locate(np.asarray([sample_id], np.int64))
        return self._datasets[int(component[0])][int(row[0])]


def blend_of(
    datasets: Mapping[str, MapStyle],
    seq_length: int,
    *,
    weights: Mapping[str, float] | None = None,
    collate: Collate | None = None,
    shift_labels: bool = False,
) -> OwnBlend:
    """Make a blend of map-style datasets of one's own, such as Hugging Face's; reads 17 items of each.

    Args:
        datasets: by the name of the component. Item i must be the same each time, in every process: it is what scores
            and checkpoints know. Items have `tokens` or `input_ids`, and `labels`, of at most `seq_length` tokens.
        seq_length: T, in tokens.
        weights: share of the draws of each component, in any unit; None: by size.
        collate: makes tensors `[1, n]` of a list with one item, such as a data collator of Hugging Face's.
        shift_labels: labels stand under their own tokens, as Hugging Face's models take them, or are missing.

    Returns:
        What `attach` and `plan_run` take as `blend`.

    Raises:
        DataError: a dataset cannot be indexed, is empty, its items are no samples, or differ from one time to the next.
        ConfigError: weights of other names.
    """
    if weights is not None and set(weights) != set(datasets):
        raise ConfigError(
            f"`weights` must have the names of the datasets, {sorted(datasets)}, but have {sorted(weights)} instead."
        )
    components: list[Component] = []
    for name, dataset in datasets.items():
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise DataError(
                f"Dataset `{name}` must be map-style, with `len(dataset)` and `dataset[i]`, but is "
                f"{type(dataset).__name__} instead: scores belong to rows that can be read again. Load it without "
                "streaming, or write it to files (`es-megatron prepare`)."
            )
        weight = float(len(dataset) if weights is None else weights[name])
        samples = Samples(dataset, seq_length, collate=collate, shift_labels=shift_labels)
        components.append(Component(name, "", len(dataset), weight, fingerprint_samples(name, samples, seq_length)))
    manifest = Manifest(tuple(components), seq_length)
    joined = Joined(manifest, list(datasets.values()))
    return OwnBlend(manifest, Samples(joined, seq_length, collate=collate, shift_labels=shift_labels))


def fingerprint_samples(name: str, samples: Samples, seq_length: int) -> str:
    """Tell a changed dataset from the same one by its length and 16 rows, spread evenly: 32 hexadecimal digits.

    Raises:
        DataError: they are no samples, or the first row differs from one time to the next.
    """
    digest = hashlib.blake2b(digest_size=16, person=b"es-samples-1")
    digest.update(f"{len(samples)} {seq_length}".encode())
    last = max(len(samples) - 1, 0)
    for probe in range(_PROBES) if len(samples) else ():
        digest.update(content_of(name, samples, last * probe // (_PROBES - 1)))
    if len(samples) and content_of(name, samples, 0) != content_of(name, samples, 0):
        raise DataError(
            f"Row 0 of dataset `{name}` must be the same each time it is read, but is not: its scores would be those "
            "of other text. Take what is random out of it, or make it a function of the row's number."
        )
    return digest.hexdigest()


def content_of(name: str, samples: Samples, row: int) -> bytes:
    """Tokens and labels of a row.

    Raises:
        DataError: it is no sample; names the dataset.
    """
    try:
        sample = samples[row]
    except DataError as error:
        raise DataError(f"Dataset `{name}`: {error}") from error
    return sample["tokens"].numpy().tobytes() + sample["labels"].numpy().tobytes()
