"""`manifest.json` of a packed dataset: what its shards hold and what they must look like. See `docs/data.md`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ssl_eo.components import one_line
from ssl_eo.data.members import CODECS, tile_member
from ssl_eo.data.regular import check_regular
from ssl_eo.data.statistics import BandStatistics
from ssl_eo.data.tar import BLOCK
from ssl_eo.data.types import TileSchema
from ssl_eo.files import atomic_write
from ssl_eo.sensors import Sensor

__all__ = [
    "FORMAT",
    "MANIFEST_NAME",
    "PLAN_NAME",
    "Manifest",
    "PackedTile",
    "ShardEntry",
    "content_hash",
    "schema_from_dict",
    "schema_to_dict",
]

FORMAT = 1
MANIFEST_NAME = "manifest.json"
PLAN_NAME = "pack.json"  # beside it: what the shards are packed from, written first


@dataclass(frozen=True)
class ShardEntry:
    """One shard: file name, number of samples, size in bytes, SHA-256 of the tar."""

    name: str
    n_samples: int
    size: int
    sha256: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or Path(self.name).name != self.name or not self.name.endswith(".tar"):
            raise ValueError(f"shard {self.name!r} is not a plain file name that ends in .tar")
        if not isinstance(self.sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256 of shard {self.name} must be 64 hexadecimal digits, got {self.sha256!r:.80}")
        for key, value in (("n_samples", self.n_samples), ("size", self.size)):
            if type(value) is not int or value < 0:
                raise ValueError(f"{key} of shard {self.name} must be a whole number from 0, got {value!r:.80}")
        if self.n_samples * BLOCK > self.size:
            raise ValueError(f"shard {self.name} of {self.size} bytes cannot hold {self.n_samples} samples")

    def matches(self, path: Path) -> bool:
        """Whether the bytes of the tar `path` are those that were packed."""
        check_regular(path)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256


@dataclass(frozen=True)
class PackedTile:
    """One tile name: its schema as the source gave it, how it is stored, and the statistics measured while packing."""

    schema: TileSchema
    codec: str
    statistics: BandStatistics

    def measured_schema(self) -> TileSchema:
        """The schema with measured mean and standard deviation; a band that is constant or empty gets std 1."""
        std = tuple(float(s) if s > 0 else 1.0 for s in self.statistics.std)
        mean = tuple(self.statistics.mean.tolist())
        return replace(self.schema, mean=mean, std=std)


@dataclass(frozen=True)
class Manifest:
    """A packed dataset. `config_hash` covers everything that its bytes follow from."""

    source_name: str
    source_fingerprint: str
    source_options: dict[str, Any]  # as in data.sources, where they are known: which split, which cells, ...
    config_hash: str
    split: str | None
    label_names: tuple[str, ...]
    tiles: dict[str, PackedTile]
    shards: tuple[ShardEntry, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.source_options, dict):
            raise ValueError(f"source.options must be an object, got {self.source_options!r:.80}")
        if not self.tiles:
            raise ValueError("tiles is empty")
        names = [shard.name for shard in self.shards]
        if len(set(names)) != len(names):
            raise ValueError(f"shards lists {next(n for n in names if names.count(n) > 1)} twice")

    @property
    def n_samples(self) -> int:
        return sum(s.n_samples for s in self.shards)

    def save(self, folder: Path) -> None:
        """Write `folder/manifest.json` atomically."""
        content = {
            "format": FORMAT,
            "source": {
                "name": self.source_name,
                "fingerprint": self.source_fingerprint,
                "options": self.source_options,
            },
            "config_hash": self.config_hash,
            "split": self.split,
            "n_samples": self.n_samples,
            "label_names": list(self.label_names),
            "tiles": {name: _tile_to_dict(name, tile) for name, tile in self.tiles.items()},
            "shards": [asdict(s) for s in self.shards],
        }
        content["checksum"] = _checksum(content)
        atomic_write(folder / MANIFEST_NAME, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read `folder/manifest.json`. Raises `ValueError` that says what to do when it is missing or not one."""
        path = folder / MANIFEST_NAME
        try:
            check_regular(path)
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{path}: no such file{_advice(folder)}") from None
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        return cls.parse(content, str(path))

    @classmethod
    def parse(cls, content: bytes, path: str) -> Manifest:
        """The manifest in the bytes of the file `path`. Raises `ValueError` that says what to do when it is none."""
        try:
            raw = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not valid JSON ({error}); pack the dataset again") from None
        found = raw.get("format") if isinstance(raw, dict) else None
        if found != FORMAT:
            raise ValueError(f"{path}: format {found!r}, this version reads format {FORMAT}; pack the dataset again")
        if raw.pop("checksum", None) != _checksum(raw):
            raise ValueError(
                f"{path} was changed or damaged after it was written: copy it again, or run the same 'ssl-eo data pack'"
                " again, which keeps the shards and writes it anew"
            )
        try:
            return cls(
                source_name=raw["source"]["name"],
                source_fingerprint=raw["source"]["fingerprint"],
                source_options=raw["source"]["options"],
                config_hash=raw["config_hash"],
                split=raw["split"],
                label_names=tuple(raw["label_names"]),
                tiles={name: _tile_from_dict(name, tile) for name, tile in raw["tiles"].items()},
                shards=tuple(ShardEntry(**entry) for entry in raw["shards"]),
            )
        except KeyError as error:
            raise ValueError(f"{path}: key {error} is missing; pack the dataset again") from None
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{path}: {one_line(error)}; pack the dataset again") from None


def content_hash(content: Any) -> str:
    """SHA-256 of `content` (plain JSON types) in a canonical spelling."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def schema_to_dict(schema: TileSchema) -> dict[str, Any]:
    """Plain JSON types with the whole sensor, so that a packed dataset does not depend on the sensor files."""
    return {
        "sensor": schema.sensor.to_dict(),
        "bands": list(schema.bands),
        "dtype": schema.dtype,
        "shape": None if schema.shape is None else list(schema.shape),
        "gsd_m": schema.gsd_m,
        "mean": list(schema.mean),
        "std": list(schema.std),
        "optional": schema.optional,
    }


def schema_from_dict(name: str, raw: Mapping[str, Any]) -> TileSchema:
    """The schema of the tile `name` that `schema_to_dict` gave; a tile that does not say so is not optional.

    Raises `ValueError` for anything else.
    """
    try:
        shape = None
        if raw["shape"] is not None:
            height, width = raw["shape"]
            shape = (height, width)
        return TileSchema(
            sensor=Sensor.from_dict(raw["sensor"]),
            bands=tuple(raw["bands"]),
            dtype=raw["dtype"],
            shape=shape,
            gsd_m=raw["gsd_m"],
            mean=tuple(raw["mean"]),
            std=tuple(raw["std"]),
            optional=raw.get("optional", False),
        )
    except KeyError as error:
        raise ValueError(f"tiles.{name}: key {error} is missing") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"tiles.{name}: {one_line(error)}") from None


def _tile_to_dict(name: str, tile: PackedTile) -> dict[str, Any]:
    return {
        "member": tile_member(name, tile.codec),
        "codec": tile.codec,
        **schema_to_dict(tile.schema),
        "statistics": tile.statistics.to_dict(),
    }


def _tile_from_dict(name: str, raw: Mapping[str, Any]) -> PackedTile:
    if raw["codec"] not in CODECS:
        raise ValueError(f"tiles.{name}.codec: {raw['codec']!r} is none of {list(CODECS)}")
    return PackedTile(schema_from_dict(name, raw), raw["codec"], BandStatistics.from_dict(raw["statistics"]))


def _checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of everything else that the manifest holds, in its order: that of the tiles and shards has a meaning."""
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def _advice(folder: Path) -> str:
    splits = sorted(p.parent.name for p in folder.glob(f"*/{MANIFEST_NAME}"))
    if splits:
        return f"; the splits {', '.join(splits)} lie in folders of their own: choose one with 'split'"
    if (folder / PLAN_NAME).is_file():
        return "; packing was not finished: run the same 'ssl-eo data pack' again, it goes on where it stopped"
    if any(folder.glob("*.tar")):
        return (
            "; 'ssl-eo data pack' did not write these tars: 'data check' and the source 'shards' are for packed"
            " datasets, 'data index' serves ssl_eo.data.shard_reader.ShardReader alone"
        )
    return "; write the dataset with 'ssl-eo data pack'"
