"""Who is compared: models, random encoders of their shapes, controls; and what they are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ssl_eo.eval.records import Record, key_of
from ssl_eo.eval.wording import features_text

__all__ = ["Entrant", "EntrantKind", "entrants_of", "identity_of", "is_encoder", "shape_of"]

EntrantKind = Literal["model", "random", "control"]  # trained, of the same shape and untrained, of pixels alone


@dataclass(frozen=True)
class Entrant:
    """What a row of a table is about."""

    title: str
    kind: EntrantKind
    identity: str


def identity_of(record: Record) -> str:
    """Of the entrant whose result the record is."""
    if record["features"] == "encoder":
        return f"{record['model']} {record['weights']}"
    return shape_of(record) if record["features"] == "random_encoder" else str(record["features"])


def is_encoder(record: Record) -> bool:
    """Whether its features are those of an encoder, trained or not; controls see pixels alone."""
    return record["features"] in ("encoder", "random_encoder")


def shape_of(record: Record) -> str:
    """The identity of the random encoder of the shape of the record's; models of one shape share it."""
    return f"random {key_of(record['encoder'] or {})}"


def entrants_of(results: Sequence[Record]) -> list[Entrant]:
    """Models, random encoders, controls. What needs no more than a name has no more."""
    models: dict[str, Record] = {}
    shapes: dict[str, list[str]] = {}
    controls: dict[str, str] = {}
    for r in results:
        if r["features"] == "encoder":
            models[identity_of(r)] = r
        elif r["features"] == "random_encoder":
            named = shapes.setdefault(shape_of(r), [])
            named += [r["model"]] if r["model"] not in named else []
        else:
            controls[str(r["features"])] = features_text(r)
    names = [str(r["model"]) for r in models.values()]
    stepped = [f"{r['model']}, step {r['step']:,}" for r in models.values()]
    titles = []
    for name, step, r in zip(names, stepped, models.values(), strict=True):
        alone = name if names.count(name) == 1 else step
        titles.append(alone if stepped.count(step) == 1 else f"{step} ({r['weights'][:6]})")
    random = {k: "random encoder" + (f" as {', '.join(v)}" if len(shapes) > 1 else "") for k, v in shapes.items()}
    return [
        *(Entrant(title, "model", key) for title, key in zip(titles, models, strict=True)),
        *(Entrant(title, "random", key) for key, title in random.items()),
        *(Entrant(title, "control", key) for key, title in controls.items()),
    ]
