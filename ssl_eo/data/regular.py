"""Whether a path is a plain file of a bearable size, before it is opened; `ssl_eo.files` says how."""

from __future__ import annotations

from ssl_eo.files import check_regular

__all__ = ["check_regular"]
