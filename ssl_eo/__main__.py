"""`python -m ssl_eo` and `torchrun -m ssl_eo` are `ssl-eo`."""

from ssl_eo.cli import entry

entry()
