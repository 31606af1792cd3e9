"""Self-supervised pretraining for Earth observation: any objective, any sensor, exactly resumable.

From Python: `load` an encoder, `train` one, and what a `Sensor` is. Torch and the rest are imported at the first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssl_eo.api import TrainedRun, load, train
    from ssl_eo.sensors import Sensor, load_sensor

__all__ = ["Sensor", "TrainedRun", "__version__", "load", "load_sensor", "train"]

__version__ = "0.1.0"

# `train` is also the package of that name, which is the function (see there): it is set as soon as it is imported.
_HOMES = {
    "Sensor": "ssl_eo.sensors",
    "TrainedRun": "ssl_eo.api",
    "load": "ssl_eo.api",
    "load_sensor": "ssl_eo.sensors",
}


def __getattr__(name: str) -> Any:
    if name == "train":
        return import_module("ssl_eo.train")
    if name not in _HOMES:
        raise AttributeError(f"module 'ssl_eo' has no attribute {name!r} (public: {', '.join(__all__)})")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
