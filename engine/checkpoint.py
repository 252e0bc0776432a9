"""The safetensors files of a checkpoint: where each tensor is, checked before any is read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import InvalidConfig

Shape = tuple[int, ...]
_IGNORED = ("rotary_emb.inv_freq",)  # buffers that old checkpoints carry


class Checkpoint:
    """The safetensors files of a directory: where each tensor is, without reading any."""

    def __init__(self, directory: str | Path, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._files: dict[str, Path] = {}
        self._open = {}
        for path in _weight_files(Path(directory)):
            try:
                handle = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise InvalidConfig(
                    str(path), "is named by the index but missing", "restore the file"
                ) from None
            except (SafetensorError, OSError) as error:
                raise InvalidConfig(
                    str(path), f"is truncated or no safetensors file ({error})", "fetch it again"
                ) from None
            self._open[path] = handle
            self._files.update(dict.fromkeys(handle.keys(), path))

    def check_names(self, wanted: dict[str, Shape], optional: Iterable[str]) -> None:
        """Refuse missing, misshaped and unexpected tensors, by name and file."""
        for name, shape in wanted.items():
            if name not in self._files:
                where = next(iter(self._open)).parent
                raise InvalidConfig(
                    str(where), f"tensor {name} is missing", "the checkpoint is incomplete"
                )
            path = self._files[name]
            found = tuple(self._open[path].get_slice(name).get_shape())
            if found != shape:
                raise InvalidConfig(
                    str(path),
                    f"tensor {name} has shape {list(found)}, config.json says {list(shape)}",
                    "weights and config.json must be of one checkpoint",
                )
        known = wanted.keys() | set(optional)
        for name, path in self._files.items():
            if name not in known and not name.endswith(_IGNORED):
                raise InvalidConfig(
                    str(path), f"tensor {name} is unexpected", "config.json must match the weights"
                )

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def fused(
        self,
        names: Sequence[str],
        *,
        rows: Sequence[range] | None = None,
        columns: range | None = None,
    ) -> Tensor:
        """Tensors of these names, one above the other, in the dtype and on the device.

        `rows` keeps a range of each tensor's rows, `columns` a range of all their columns; what is
        not kept is not read.
        """
        kept = [None if rows is None else rows[place] for place in range(len(names))]
        shapes = [self._shape(name, part, columns) for name, part in zip(names, kept, strict=True)]
        height = sum(shape[0] for shape in shapes)
        result = torch.empty((height, *shapes[0][1:]), dtype=self._dtype, device=self._device)
        at = 0
        for name, part, shape in zip(names, kept, shapes, strict=True):
            result[at : at + shape[0]].copy_(self._part(name, part, columns))  # one at a time
            at += shape[0]
        return result

    def _shape(self, name: str, rows: range | None, columns: range | None) -> Shape:
        """Of what is kept of a tensor."""
        height, *width = self._open[self._files[name]].get_slice(name).get_shape()
        width = width if columns is None or not width else [len(columns)]
        return (height if rows is None else len(rows), *width)

    def _part(self, name: str, rows: range | None, columns: range | None) -> Tensor:
        file = self._open[self._files[name]]
        stored = file.get_slice(name)
        shape = stored.get_shape()
        height, width = range(shape[0]), range(shape[-1])
        rows = rows if rows is not None else height
        columns = columns if columns is not None else width
        if rows == height and columns == width:
            return file.get_tensor(name)  # maps the file, copies nothing
        if len(shape) == 1:
            return stored[rows.start : rows.stop]
        return stored[rows.start : rows.stop, columns.start : columns.stop]


def _weight_files(root: Path) -> list[Path]:
    index = root / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise InvalidConfig(
                str(index), f"cannot be read ({error!r})", "restore the file"
            ) from None
        return [root / name for name in names]
    single = root / "model.safetensors"
    if not single.exists():
        raise InvalidConfig(
            str(root),
            "holds neither model.safetensors nor model.safetensors.index.json",
            "save the checkpoint as safetensors",
        )
    return [single]
