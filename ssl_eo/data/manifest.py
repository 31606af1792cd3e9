"""`manifest.json` of a packed dataset: what its shards hold and what they must look like. See `docs/data.md`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ssl_eo.data.members import CODECS, tile_member
from ssl_eo.data.shards import atomic_file
from ssl_eo.data.statistics import BandStatistics
from ssl_eo.data.types import TileSchema
from ssl_eo.sensors import Sensor

__all__ = [
    "FORMAT",
    "MANIFEST_NAME",
    "Manifest",
    "PackedTile",
    "ShardEntry",
    "content_hash",
    "schema_from_dict",
    "schema_to_dict",
]

FORMAT = 1
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class ShardEntry:
    """One shard: file name, number of samples, size in bytes, SHA-256 of the tar."""

    name: str
    n_samples: int
    size: int
    sha256: str


@dataclass(frozen=True)
class PackedTile:
    """One tile name: its schema as the source gave it, how it is stored, and the statistics measured while packing."""

    schema: TileSchema
    codec: str
    statistics: BandStatistics

    def measured_schema(self) -> TileSchema:
        """The schema with measured mean and standard deviation; a band that is constant or empty gets std 1."""
        std = tuple(float(s) if s > 0 else 1.0 for s in self.statistics.std)
        old = self.schema
        mean = tuple(self.statistics.mean.tolist())
        return TileSchema(old.sensor, old.bands, old.dtype, old.shape, old.gsd_m, mean=mean, std=std)


@dataclass(frozen=True)
class Manifest:
    """A packed dataset. `config_hash` covers everything that its bytes follow from."""

    source_name: str
    source_fingerprint: str
    config_hash: str
    split: str | None
    label_names: tuple[str, ...]
    tiles: dict[str, PackedTile]
    shards: tuple[ShardEntry, ...]

    @property
    def n_samples(self) -> int:
        return sum(s.n_samples for s in self.shards)

    def save(self, folder: Path) -> None:
        """Write `folder/manifest.json` atomically."""
        content = {
            "format": FORMAT,
            "source": {"name": self.source_name, "fingerprint": self.source_fingerprint},
            "config_hash": self.config_hash,
            "split": self.split,
            "n_samples": self.n_samples,
            "label_names": list(self.label_names),
            "tiles": {name: _tile_to_dict(name, tile) for name, tile in self.tiles.items()},
            "shards": [asdict(s) for s in self.shards],
        }
        with atomic_file(folder / MANIFEST_NAME) as file:
            file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read `folder/manifest.json`. Raises `ValueError` that says what to do when it is missing or not one."""
        path = folder / MANIFEST_NAME
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{path}: no such file{_advice(folder)}") from None
        except ValueError as error:
            raise ValueError(f"{path}: not valid JSON ({error}); pack the dataset again") from None
        found = raw.get("format") if isinstance(raw, dict) else None
        if found != FORMAT:
            raise ValueError(f"{path}: format {found!r}, this version reads format {FORMAT}; pack the dataset again")
        try:
            return cls(
                source_name=raw["source"]["name"],
                source_fingerprint=raw["source"]["fingerprint"],
                config_hash=raw["config_hash"],
                split=raw["split"],
                label_names=tuple(raw["label_names"]),
                tiles={name: _tile_from_dict(name, tile) for name, tile in raw["tiles"].items()},
                shards=tuple(_shard_entry(entry) for entry in raw["shards"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: {type(error).__name__}: {error}; pack the dataset again") from None


def content_hash(content: Any) -> str:
    """SHA-256 of `content` (plain JSON types) in a canonical spelling."""
    return sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def schema_to_dict(schema: TileSchema) -> dict[str, Any]:
    """Plain JSON types with the whole sensor, so that a packed dataset does not depend on the sensor files."""
    return {
        "sensor": schema.sensor.to_dict(),
        "bands": list(schema.bands),
        "dtype": schema.dtype,
        "shape": list(schema.shape),
        "gsd_m": schema.gsd_m,
        "mean": list(schema.mean),
        "std": list(schema.std),
    }


def schema_from_dict(name: str, raw: Mapping[str, Any]) -> TileSchema:
    """The schema of the tile `name` that `schema_to_dict` gave."""
    height, width = raw["shape"]
    return TileSchema(
        sensor=Sensor.from_dict(raw["sensor"], where=f"tiles.{name}.sensor"),
        bands=tuple(raw["bands"]),
        dtype=raw["dtype"],
        shape=(height, width),
        gsd_m=raw["gsd_m"],
        mean=tuple(raw["mean"]),
        std=tuple(raw["std"]),
    )


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


def _shard_entry(raw: Mapping[str, Any]) -> ShardEntry:
    entry = ShardEntry(**raw)
    if Path(entry.name).name != entry.name:
        raise ValueError(f"shard {entry.name!r} is not a plain file name")
    return entry


def _advice(folder: Path) -> str:
    splits = sorted(p.parent.name for p in folder.glob(f"*/{MANIFEST_NAME}"))
    if splits:
        return f"; the splits {', '.join(splits)} lie in folders of their own: choose one with 'split'"
    if any(folder.glob("shard-*.tar*")):
        return "; packing was not finished: run the same 'ssl-eo data pack' again, it goes on where it stopped"
    return "; write the dataset with 'ssl-eo data pack'"
