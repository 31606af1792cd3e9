"""What data costs: reading, memory, rendering, waiting. One table, with the targets that this repository sets itself.

    python benchmarks/data.py [--quick] [--only SECTION]

reading    samples per second of one core from an MMEarth64 file and from packed shards, beside what research code does
archives   the same of other archives: files as they were downloaded, and packed shards
memory     of eight loading processes on a table of 1.2 million samples, beside that of one
rendering  crop, resize and normalise a batch, beside doing so for each sample
waiting    share of the time that training waits for data

Makes its own files in a temporary folder (up to 4 GB; TMPDIR says where). The page cache is warm. Reading and rendering
are measured in processor time, in turns of which the best counts; ratios are what to trust. `--quick` takes a minute,
on smaller files and for rougher numbers.
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import _table
from _archives import measure_archives
from _memory import measure_memory
from _reading import measure_reading
from _rendering import measure_rendering
from _waiting import measure_waiting

SECTIONS: dict[str, Callable[[Path, bool], list[_table.Row]]] = {
    "reading": measure_reading,
    "archives": measure_archives,
    "memory": measure_memory,
    "rendering": measure_rendering,
    "waiting": measure_waiting,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute, rough numbers")
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    arguments = parser.parse_args()
    rows = []
    for name in [arguments.only] if arguments.only else SECTIONS:
        with tempfile.TemporaryDirectory(prefix="ssl_eo-") as folder:
            rows += SECTIONS[name](Path(folder), arguments.quick)
    print(_table.text(rows))
    print(f"\n{_machine()}{', --quick: rough numbers' if arguments.quick else ''}")


def _machine() -> str:
    import h5py

    try:
        importlib.import_module("isal")
        inflate = "isal"
    except ImportError:
        inflate = "zlib"
    return f"{_table.machine()}, HDF5 {h5py.version.hdf5_version}, inflate by {inflate}"


if __name__ == "__main__":
    main()
