"""Writes `ssl_eo/weights/reference_outputs.json` anew: what our code makes of images and weights by formula.

    python tests/weights/make_reference_outputs.py [NAME ...]

To be run where the tests of `tests/weights` pass, for it is they that compare with the published code. With names,
those are made anew and the others are kept. The whole takes minutes, and 5 GB of memory.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from ssl_eo.weights import _formula, _reference, base

PATH = Path(_reference.__file__).with_name("reference_outputs.json")
# Of outputs of order 1, in float32: how far machines and builds of torch may be from each other.
TOLERANCE = 1e-4
DIGITS = 7


def page_of(outputs: dict[str, Tensor]) -> dict[str, Any]:
    found = {}
    for name, output in outputs.items():
        kept = _formula.summary(output)
        assert isinstance(kept["values"], list)
        values = [round(value, DIGITS) for value in kept["values"]]
        mean, std = (round(float(kept[key]), DIGITS) for key in ("mean", "std"))
        found[name] = {"shape": list(output.shape), "mean": mean, "std": std, "values": values}
    return {"tolerance": TOLERANCE, "outputs": found}


def main(names: list[str]) -> None:
    pages = json.loads(PATH.read_text()) if PATH.is_file() else {}
    known = base.released_names()
    for name in names or known:
        start = time.perf_counter()
        pages[name] = page_of(_reference.outputs_of(name))
        seconds = time.perf_counter() - start
        spread = (f"{output} {kept['std']:.2f}" for output, kept in pages[name]["outputs"].items())
        print(f"{name}: {seconds:.1f} s; {', '.join(spread)}", flush=True)
        rows = (f"{json.dumps(one)}: {json.dumps(pages[one])}" for one in known if one in pages)
        PATH.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
