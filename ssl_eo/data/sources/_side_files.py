"""Files beside the pixels: cards of data sets, lists of names, JSON lists, statistics.

What a side file says is not trusted: its size is looked at before it is parsed, and no name leads out of its folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ssl_eo.components import one_line
from ssl_eo.data.regular import check_regular
from ssl_eo.data.types import TileSchema
from ssl_eo.resources import find_resource
from ssl_eo.sensors import load_sensor

__all__ = [
    "card_schema",
    "dataset_card",
    "evenly_spaced",
    "iso_date",
    "name_inside",
    "printable",
    "read_json_list",
    "read_json_object",
    "read_lines",
    "read_statistics",
    "writable",
]

_MAX_STATISTICS_BYTES = 4 << 20


def name_inside(root: Path, name: bytes) -> str:
    """`name`, a file of the folder `root`, as text. Raises `ValueError` if it is no UTF-8 or leads out of it."""
    try:
        text = name.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{root}: the name {printable(name)!r} is not UTF-8; rename the file and its entry") from None
    path = PurePosixPath(text)
    if not text or path.is_absolute() or ".." in path.parts or "\0" in text:
        raise ValueError(
            f"{root}: the name {text!r} leads out of this folder; get a clean copy of the list that has it"
        )
    return text


def printable(name: bytes) -> str:
    """A name as text that can be written anywhere; bytes that are not UTF-8 are written as hexadecimal."""
    return name.decode(errors="backslashreplace")


def writable(text: str) -> str:
    """`text` as it can be written anywhere: halves of surrogate pairs, which no encoding has, as hexadecimal."""
    return text.encode(errors="backslashreplace").decode()


def read_json_list(path: Path, max_bytes: int, what: str) -> list[Any]:
    """The list in a JSON file. Raises `ValueError` that names the file and `what` it should be."""
    found: list[Any] = _read_json(path, list, max_bytes, what)
    return found


def read_json_object(path: Path, max_bytes: int, what: str) -> dict[str, Any]:
    """The object in a JSON file. Raises `ValueError` as `read_json_list` does."""
    found: dict[str, Any] = _read_json(path, dict, max_bytes, what)
    return found


def read_lines(path: Path, max_bytes: int, what: str) -> list[str]:
    """The lines of a text file that hold anything, stripped. Raises `ValueError` as `read_json_list` does."""
    lines = [line.strip() for line in _read_text(path, max_bytes, what).splitlines()]
    if not (held := [line for line in lines if line]):
        raise ValueError(f"{path} is empty, expected {what}")
    return held


def read_statistics(path: str, bands: Sequence[str]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of `bands`, from a JSON file with lists `bands`, `mean` and `std`.

    Raises `ValueError` that begins with `statistics`, the key of a config that names such a file.
    """
    expected = "lists `bands`, `mean` and `std`"
    try:
        raw = read_json_object(Path(path), _MAX_STATISTICS_BYTES, expected)
    except ValueError as error:
        raise ValueError(f"statistics: {error}") from None
    try:
        rows = zip(raw["bands"], map(float, raw["mean"]), map(float, raw["std"]), strict=True)
        table = {band: (mean, std) for band, mean, std in rows}
        mean, std = zip(*(table[band] for band in bands), strict=True)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"statistics: {path} must hold {expected} of one length that cover {', '.join(bands)}; problem: {error!r}"
        ) from None
    return mean, std


def evenly_spaced(n: int, limit: int) -> list[int]:
    """At most `limit` of the indices below `n`: first and last, and between them as evenly as can be."""
    if n <= limit:
        return list(range(n))
    return [int(i) for i in np.linspace(0, n - 1, limit).round()]


def iso_date(seconds: int) -> str | None:
    """Seconds of 1970 (UTC) as ISO 8601, a day where the time of it is midnight; None for NaT."""
    time = np.datetime64(seconds, "s")
    if np.isnat(time):
        return None
    return f"{time}Z" if seconds % 86_400 else str(time.astype("datetime64[D]"))


def dataset_card(name: str) -> Any:
    """What `datasets_meta/datasets/<name>.yaml` holds."""
    import yaml

    path = find_resource("datasets_meta/datasets", name)
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {one_line(error)}") from None


def card_schema(array: Mapping[str, Any], dtype: str) -> TileSchema:
    """The schema of optional tiles of any size that an entry `arrays` of a card describes."""
    sensor = load_sensor(array["sensor"])
    mean, std = tuple(map(float, array["mean"])), tuple(map(float, array["std"]))
    return TileSchema(sensor, tuple(array["bands"]), dtype, None, array["gsd_m"], mean, std, optional=True)


def _read_json(path: Path, kind: type, max_bytes: int, what: str) -> Any:
    text = _read_text(path, max_bytes, what)
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply, expected {what}") from None
    except ValueError as error:  # also for a number of thousands of digits
        raise ValueError(f"{path} is not valid JSON ({error}), expected {what}; unpack it again") from None
    if not isinstance(found, kind):
        raise ValueError(f"{path} holds {type(found).__name__}, expected {what}")
    return found


def _read_text(path: Path, max_bytes: int, what: str) -> str:
    try:
        check_regular(path)
        if (size := path.stat().st_size) > max_bytes:
            raise ValueError(f"{path} has {size:,} bytes, expected {what} of at most {max_bytes:,}")
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}), expected {what}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}), expected {what}") from None
