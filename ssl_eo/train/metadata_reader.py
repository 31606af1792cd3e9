"""What of a checkpoint torch writes as pickles, read without running it: its table of contents, and single values.

A checkpoint may come from anyone. Tensors are read by torch without code of the file; of the pickle only the classes
that torch's distributed checkpoint puts there are known here, and anything else is refused.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

__all__ = ["MetadataReader", "ValuePlanner"]

_FILE = ".metadata"
_OF_DCP = "torch.distributed.checkpoint"
_KNOWN: dict[str, frozenset[str]] = {
    f"{_OF_DCP}.metadata": frozenset(
        (
            *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
            *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
        )
    ),
    f"{_OF_DCP}.filesystem": frozenset(("_StorageInfo", "_StoragePrefix")),
    "torch.serialization": frozenset(("_get_layout",)),
    "pathlib": frozenset(("PosixPath", "PurePosixPath", "Path")),
    "collections": frozenset(("OrderedDict",)),
}


class MetadataReader(FileSystemReader):
    """Reads the checkpoint folder `path`. `ValueError` for a table of contents that torch would not have written."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / _FILE
        try:
            with file.open("rb") as stream:
                found = _Unpickler(stream).load()
        except OSError:
            raise
        except Exception as error:  # a damaged pickle may raise anything
            raise ValueError(f"{file} is no table of contents of a checkpoint: {error}") from None  # the cause is said
        if not isinstance(found, Metadata) or not isinstance(found.state_dict_metadata, dict):
            raise ValueError(f"{file} is no table of contents of a checkpoint: it holds {type(found).__name__}")
        if found.storage_meta is None:
            found.storage_meta = StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class ValuePlanner(DefaultLoadPlanner):
    """Loads values that are no tensors, such as learning rates, without code of the file: torch's own would run it."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Raise `pickle.UnpicklingError` for anything but tensors, numbers, texts and what holds such."""
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch":
            value = getattr(torch, name, None)
            if value is torch.Size or isinstance(value, torch.dtype):
                return value
        elif name in _KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")
