"""What it takes to cite results and to get them again: models, data, commands, dates, versions."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ssl_eo.eval.comparison import Comparison
from ssl_eo.eval.entrants import Entrant, identity_of
from ssl_eo.eval.features import ALL_TAPS
from ssl_eo.eval.records import Record
from ssl_eo.eval.wording import condition_text, places_text, value_text
from ssl_eo.models.vit import SIZES
from ssl_eo.resources import resource_dir

__all__ = ["Facts", "dates_of", "encoder_text", "facts_of_models", "facts_of_software", "facts_of_tasks"]

_VARIED = {"partition": "labels", "subset": "bands", "size": "sizes", "tap": "read at"}
_MAX_BANDS = 16  # that are named one by one


@dataclass(frozen=True)
class Facts:
    """Pairs of what and how about one subject."""

    subject: str
    pairs: Sequence[tuple[str, str]]


def facts_of_models(comparison: Comparison) -> list[Facts]:
    """Each model: its shape, its weights, and the commands that measured it."""
    return [Facts(model.title, _facts_of_model(comparison, model)) for model in comparison.models]


def facts_of_tasks(comparison: Comparison) -> list[Facts]:
    """Each task: its data and their reference, what was shown of them, and when it was measured."""
    found = []
    for task in comparison.tasks:
        records = [r for r in comparison.results if r["task"] == task]
        r = comparison.example(task).records[0]
        part = condition_text("partition", comparison.condition(task, "partition"))
        bands = [str(name) for name in r.get("bands") or ()]
        named = f": {', '.join(bands)}" if len(bands) <= _MAX_BANDS else ""
        test = f"{r['n_test']:,}{places_text(r)}"
        pairs = [
            ("dataset", "; ".join(_references(r))),
            ("samples", f"training {r['n_train']:,} ({part}), validation {r['n_val']:,}, test {test}"),
            ("shown", f"{r['tile']}, {len(bands)} bands{named}" if bands and r.get("tile") else ""),
            ("size", f"{r['size_px']} px, resized by {r['interpolation']} where it differs"),
            ("normalised by", f"{r['normalization']} mean and standard deviation of each band"),
            ("probes", _listed(records, "probe")),
            *((word, ", ".join(value_text(axis, v) for v in _values(records, axis))) for axis, word in _VARIED.items()),
            ("pooling", _listed(records, "pool")),
            ("seeds", _listed(records, "seed")),
            ("resamples", _listed(records, "n_resamples")),
            ("measured", dates_of(records)),
        ]
        found.append(Facts(task, [(what, how) for what, how in pairs if how]))
    return found


def facts_of_software(records: Sequence[Record]) -> list[Facts]:
    """Versions that results were measured with; the code is told by its commit and by its hash."""
    said = {"version": "ssl_eo", "commit": "commit", "code": "hash of the code", "torch": "torch"}
    pairs = [(what, _listed(records, key)) for key, what in said.items()]
    return [Facts("Software", [(what, how) for what, how in pairs if how])]


def dates_of(records: Sequence[Record]) -> str:
    """The day on which `records` were measured, or the first and the last."""
    days = sorted({str(r["date"])[:10] for r in records if r.get("date")})
    return " to ".join(dict.fromkeys([days[0], days[-1]])) if days else ""


def encoder_text(encoder: Mapping[str, Any]) -> str:
    """`ViT, 64 wide x 4 blocks, patches of 8 px`: a config may name a size and have another width or depth."""
    width, depth, _ = SIZES.get(str(encoder.get("size")), (None, None, None))
    width, depth = encoder.get("embed_dim") or width, encoder.get("depth") or depth
    return f"ViT, {width} wide x {depth} blocks, patches of {encoder.get('patch_size')} px"


def _facts_of_model(comparison: Comparison, model: Entrant) -> list[tuple[str, str]]:
    own = [r for r in comparison.results if identity_of(r) == model.identity]
    newest = max(own, key=lambda r: str(r["date"]))
    encoder = [encoder_text(newest["encoder"] or {}), f"weights {newest['weights']}"]
    encoder += [f"step {newest['step']:,}"] if newest["step"] else []
    return [("encoder", ", ".join(encoder)), *(("measured again by", _command(of)) for of in _by_command(own))]


def _by_command(records: Sequence[Record]) -> list[list[Record]]:
    """Those of each value of what one command has one value for; what has no pool, patches, goes with the first."""
    pools = _values(records, "pool")
    found: dict[tuple[Any, ...], list[Record]] = {}
    for r in sorted(records, key=lambda r: r["pool"] is None):
        pool = r["pool"] or next(iter(pools), None)
        found.setdefault((pool, r.get("precision"), r["n_resamples"]), []).append(r)
    return list(found.values())


def _command(records: Sequence[Record]) -> str:
    """That measures `records`, of one model, anew, once its path is put in; and what they combine to besides."""
    ratios = {
        float(tap[6:]) if tap.startswith("depth_") else 1.0 for r in records if (tap := str(r["tap"])) != ALL_TAPS
    }
    values: dict[str, list[str]] = {
        "tasks": [task if _is_shipped(task) else f"{task}.yaml" for task in _values(records, "task")],
        "protocol": _values(records, "probe"),
        "partitions": _values(records, "partition"),
        "bands": _values(records, "subset"),
        "size": _values(records, "size"),
        "seeds": _values(records, "seed"),
        "taps": [f"{ratio:g}" for ratio in sorted(ratios)],
        "pool": _values(records, "pool"),
        "precision": _values(records, "precision"),
        "resamples": _values(records, "n_resamples"),
    }
    options = [word for name, of in values.items() if of for word in (f"--{name}", *of)]
    return shlex.join(["ssl-eo", "eval", "--model", f"{records[0]['model']}=PATH", *options, "--out", "scores"])


def _values(records: Sequence[Record], key: str) -> list[str]:
    return list(dict.fromkeys(str(r[key]) for r in records if r.get(key) is not None))


def _listed(records: Sequence[Record], key: str) -> str:
    return ", ".join(_values(records, key))


def _is_shipped(task: str) -> bool:
    return (resource_dir("datasets_meta") / "benchmarks" / f"{task}.yaml").is_file()


def _references(record: Record) -> list[str]:
    """Title, publication and licence of the datasets of a task that have a card; of others what reads them."""
    found: list[str] = []
    for source in (record.get("sources") or {}).values():
        card = _card(str(source["name"]))
        member = str(source["options"].get("dataset"))  # where the card is of a collection
        own = card.get("datasets", {}).get(member)
        licence = (card if own is None else own).get("licence")
        one = [", ".join(filter(None, (card.get("title"), member if own is not None else None))), card.get("source")]
        one += [f"licence: {licence}"] if licence else []
        found.append(". ".join(filter(None, one)) or f"no reference known; read by the source {source['name']}")
    return list(dict.fromkeys(found))


@cache
def _card(source: str) -> dict[str, Any]:
    """What is known of the dataset that a source reads; nothing of sources that read whatever they are given."""
    import yaml

    path = resource_dir("datasets_meta") / "datasets" / f"{source}.yaml"
    return dict(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.is_file() else {}
