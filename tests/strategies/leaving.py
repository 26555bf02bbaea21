"""Two processes that end while gloo's thread still lets go of what a collective was about; prints exit codes.

    python tests/strategies/leaving.py

The last reference to rank 0's tensor is gloo's, and what happens when that goes takes a while.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref

import accelerate  # noqa: F401  # once for both processes
import torch
import torch.distributed as dist

from finetune import distributed
from finetune.distributed.world import _free_port


def leave(rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.start("cpu", uses_deepspeed=False)
    letting_go, main = threading.Event(), threading.current_thread()

    def linger(_: object) -> None:
        assert threading.current_thread() is not main
        letting_go.set()
        ends = time.monotonic() + 0.5
        while time.monotonic() < ends:
            pass
        print("let go", flush=True)

    tensor = torch.ones(4)
    watched = weakref.ref(tensor, linger)
    if rank == 0:
        dist.all_reduce(tensor, async_op=True)
        del tensor
        assert letting_go.wait(60) and watched() is None
    else:
        time.sleep(0.5)
        dist.all_reduce(tensor)
        del watched
    distributed.stop()


def main() -> None:
    port = _free_port()
    ranks = []
    for rank in range(2):
        ranks.append(os.fork())
        if ranks[rank] == 0:
            leave(rank, port)
            sys.exit(0)
    print([os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks])


if __name__ == "__main__":
    main()
