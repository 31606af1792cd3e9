"""Writes `ssl_eo/sensor_tables.json`, the shipped sensors as JSON: `python tests/make_sensor_tables.py`.

It is read where there is no PyYAML. Run it after a change in `datasets_meta/sensors`; a test says when.
"""

from __future__ import annotations

import json
from pathlib import Path

from ssl_eo.sensors import load_sensor

ROOT = Path(__file__).parent.parent
TABLES = ROOT / "ssl_eo" / "sensor_tables.json"


def tables() -> str:
    """One line a sensor."""
    names = sorted(path.stem for path in (ROOT / "datasets_meta" / "sensors").glob("*.yaml"))
    lines = [f" {json.dumps(name)}: {json.dumps(load_sensor(name).to_dict())}" for name in names]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    TABLES.write_text(tables(), encoding="utf-8")
