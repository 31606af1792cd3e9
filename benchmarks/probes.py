"""What probes on cached features cost beside the same models of scikit-learn, and that they are as often right.

    python benchmarks/probes.py [--only SECTION] [--samples N ...] [--turns N]

logistic   the path of penalties of logistic regression, chosen on a validation set, and linear heads by descent
ridge      all penalties of ridge regression
knn        nearest neighbours by cosine

Processor time of one thread, the best of all turns. `--size small` is a toy that shows in seconds that everything
works; its figures say nothing.
"""

from __future__ import annotations

import argparse

import _table
from _probing import SECTIONS, Size

SAMPLES, FEATURES, CLASSES = (2000, 10000), (384, 768), (10, 43)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    parser.add_argument("--samples", type=int, nargs="+", default=SAMPLES, help="numbers of training samples")
    parser.add_argument("--turns", type=int, default=1, help="turns, of which the best counts")
    parser.add_argument("--size", choices=("base", "small"), default="base", help="small: a toy")
    arguments = parser.parse_args()
    toy = arguments.size == "small"
    sizes = [Size(n, d, k) for n in arguments.samples for d in FEATURES for k in CLASSES]
    rows = []
    for name in [arguments.only] if arguments.only else SECTIONS:
        for size in [Size(300, 16, 4)] if toy else sizes:
            rows += SECTIONS[name](size, arguments.turns)
    print(_table.text(rows))
    print(f"\n{_table.machine()}, 1 thread{', --size small: a toy' if toy else ''}")


if __name__ == "__main__":
    main()
