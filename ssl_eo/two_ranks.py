"""Two processes of this machine that add two numbers, as ranks of a run do: whether they can meet at all."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

__all__ = ["add_on_two_ranks"]

_LOOK_EVERY_S = 0.05


def add_on_two_ranks(on_gpus: bool, limit_s: float) -> str | None:
    """What went wrong, in one line; None where two processes met and agreed, on two GPUs (nccl) or CPUs (gloo).

    They join as under torchrun, by a store that this process serves. None outlives the call, which takes `limit_s` and
    little more, nor this process, however it ends.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, but not in __all__

    try:
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    except RuntimeError as error:
        return f"no port of localhost can be served: {str(error).splitlines()[0]}"
    ranks: list[subprocess.Popen[bytes]] = []
    with ExitStack() as opened:
        try:
            logs = [opened.enter_context(tempfile.TemporaryFile()) for _ in range(2)]
        except OSError as error:
            return f"no temporary file can be made: {error.strerror or error}"
        try:
            for rank, log in enumerate(logs):
                ranks.append(opened.enter_context(_start(rank, store.port, on_gpus, limit_s, log)))
            return _wait(ranks, logs, limit_s)
        finally:
            for process in ranks:
                process.kill()


def _start(rank: int, port: int, on_gpus: bool, limit_s: float, log: IO[bytes]) -> subprocess.Popen[bytes]:
    package = str(Path(__file__).parent.parent)
    launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    environment = {
        **os.environ,
        **{name: str(value) for name, value in launch.items()},
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH")))),
    }
    if not on_gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "ssl_eo.two_ranks", str(limit_s)]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log)


def _wait(ranks: Sequence[subprocess.Popen[bytes]], logs: Sequence[IO[bytes]], limit_s: float) -> str | None:
    limit = time.monotonic() + limit_s
    while time.monotonic() < limit:
        codes = [process.poll() for process in ranks]
        for rank, code in enumerate(codes):
            if code:  # the other one would wait for it
                logs[rank].seek(0)
                lines = logs[rank].read().decode(errors="replace").split("\n")
                said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
                return f"rank {rank} ended with status {code}: {said}"
        if None not in codes:
            return None
        time.sleep(_LOOK_EVERY_S)
    return f"they have not met within {limit_s:g} s"


def _end_with_parent() -> None:
    """The other end of stdin is closed when the process that holds it has ended, also one that was killed."""

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _main() -> None:
    _end_with_parent()

    import torch
    import torch.distributed as dist

    from ssl_eo.distributed import init_world, shutdown

    world = init_world(float(sys.argv[1]))
    total = torch.tensor(world.rank + 1, device=world.device)
    dist.all_reduce(total)
    if total.item() != 3:
        raise RuntimeError(f"1 + 2 is {total.item()} on rank {world.rank}")
    shutdown()


if __name__ == "__main__":
    _main()
