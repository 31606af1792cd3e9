"""Self-supervised pretraining for Earth observation: any objective, any sensor, exactly resumable."""

__version__ = "0.1.0"
