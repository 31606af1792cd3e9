"""The code that a model of a study depends on, as a hash in its key."""

from __future__ import annotations

from functools import cache
from hashlib import blake2b
from pathlib import Path

import ssl_eo
from ssl_eo.eval.provenance import code_digest

__all__ = ["study_code", "study_files"]

_PACKAGE = Path(ssl_eo.__file__).parent
# Evaluations run the transformers and never the pyramids of ensembles, so these are named here.
_PARTS = ("adapt/*.py", "eval/decoders/*.py", "models/convnext.py", "train/optim.py", "schedules.py")
# Ensembles of others, which code counts, the page and its tables, which lines are records.
_OF_OTHERS = ("eos_fm", "study_code", "study_page", "study_records", "study_tables")
# What becomes of a model once it is trained.
_OF_TRAINED = ("saved", "saved_page", "scene_maps", "scene_outputs", "scenes", "study_models", "tiling")
_TELLS_NOTHING = frozenset(f"adapt/{name}.py" for name in (*_OF_OTHERS, *_OF_TRAINED))  # no score comes of it


@cache
def study_code() -> str:
    """Of the sources that a score of a study can depend on: `study_files`, and those of evaluations."""
    digest = blake2b(code_digest().encode(), digest_size=12)
    for name, path in study_files().items():
        content = path.read_bytes()
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def study_files() -> dict[str, Path]:
    """Sources of what trains and scores models on labels, by their place in the package."""
    found = {path.relative_to(_PACKAGE).as_posix(): path for part in _PARTS for path in sorted(_PACKAGE.glob(part))}
    return {name: path for name, path in found.items() if name not in _TELLS_NOTHING}
