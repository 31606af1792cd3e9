"""The kinds of labels that a task may have. What each probe, metric and split does with them is written there."""

from __future__ import annotations

from typing import Literal

__all__ = ["Kind"]

# One class a sample; any number of classes a sample; a class a pixel; a number a sample.
Kind = Literal["classification", "multilabel", "segmentation", "regression"]
