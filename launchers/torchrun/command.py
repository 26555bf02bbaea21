"""The command: options, the way to the other nodes, and the exit code of all workers."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

from finetune import PEER_LOST, UserError, first_line
from launchers.torchrun.failures import say
from launchers.torchrun.signals import Signals

DESCRIPTION = """\
torchrun, with these differences:

exit code   the workers' own: 0 when all are well, 75 (stopped by a signal after saving: the same command goes on),
            69 (another rank died or hung), 2 (a mistake that a retry does not mend), 128+N for a worker killed by
            signal N. When workers differ: 2, else 75, else that of the first to fail, and 69 last.
signals     SIGUSR1, SIGUSR2, SIGTERM, SIGINT and SIGHUP are passed on to each worker, each time that they come;
            then the launcher waits until the workers have ended, however long they save.
failures    one line names the rank and host that failed first. The other nodes are told, and end as well: workers
            have --grace seconds to end by themselves (SIGTERM after half of it, then SIGKILL).
network     with several nodes, gloo and the rendezvous use the interface that leads to --rdzv-endpoint (or
            --master-addr), unless GLOO_SOCKET_IFNAME, --local-addr and --rdzv-conf is_host=... say otherwise.
restarts    --max-restarts is as in torchrun, but after exit codes 2, 75 and 130 nothing is restarted.
orphans     workers are killed when the launcher is.
"""
EXAMPLES = """\
examples:
  python -m launchers.torchrun --nproc-per-node 8 -m finetune.train experiment=NAME data.shards=LATENTS
  python -m launchers.torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
    --rdzv-id JOB -m finetune.train strategy=zero2 ...
"""


def main(argv: Sequence[str]) -> int:
    """Launch, wait, and return the workers' exit code.

    Raises:
        UserError: options that torch refuses.
    """
    signals = Signals()  # before torch's import, which takes seconds
    chatty = "LOGLEVEL" in os.environ
    cpp_level = os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "INFO" if chatty else "ERROR")
    import torch.distributed.run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import api as launcher

    from launchers.torchrun.agent import Agent

    if not chatty and cpp_level == "ERROR":
        del os.environ["TORCH_CPP_LOG_LEVEL"]  # the agent's alone
    options = parse(torchrun.get_args_parser(), argv)
    find_way(options)
    if not chatty:
        logging.disable(logging.ERROR)  # our line says it
    made: list[Agent] = []

    def make_agent(*args: Any, **kwargs: Any) -> Agent:
        made.append(Agent(*args, signals=signals, grace=options.grace, **kwargs))
        return made[-1]

    api: Any = launcher
    api.LocalElasticAgent = make_agent  # torchrun has no other way to take one
    try:
        torchrun.run(options)
    except ChildFailedError:
        pass
    except UserError:
        raise
    except Exception as error:
        if not made and isinstance(error, (ValueError, AssertionError)):
            raise UserError(first_line(error)) from None
        code = made[-1].exit_code() if made else PEER_LOST
        if code in (0, PEER_LOST):
            why = f"{type(error).__name__}: {first_line(error)}"
            say(f"the nodes have not come together, or lost each other: {why}")
        if made:
            made[-1].end_soon()
        return code or PEER_LOST
    return made[-1].exit_code()


def find_way(args: Any) -> None:
    """Settle by which address and interface this node meets the others, as far as the user has not.

    torch and gloo go by the machine's own name, which on many machines leads to the loopback interface or nowhere.
    """
    endpoint = args.rdzv_endpoint or (args.master_addr if args.rdzv_backend == "static" else "")
    if args.nnodes in ("1", "1:1") or args.standalone or not endpoint:
        return
    host = endpoint.rsplit(":", 1)[0] if endpoint.count(":") == 1 else endpoint
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing: the kernel chooses the way
            ours, theirs = probe.getsockname()[0], probe.getpeername()[0]
            names = [name for _, name in socket.if_nameindex() if _address_of(probe, name) == ours]
    except OSError:
        return  # torch says what is wrong with the name
    if ours.startswith("127."):
        return
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])
    args.local_addr = args.local_addr or ours
    if args.rdzv_backend == "c10d" and "is_host" not in args.rdzv_conf:
        from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname

        guess = None
        with contextlib.suppress(OSError):  # the machine's own name means nothing to it
            guess = _matches_machine_hostname(host)
        # Where torch guesses right it is left to: of two launchers on one machine the second then becomes a guest.
        if (ours == theirs) != guess:
            settings = [args.rdzv_conf] if args.rdzv_conf else []
            args.rdzv_conf = ",".join([*settings, f"is_host={int(ours == theirs)}"])


def _address_of(probe: socket.socket, name: str) -> str:
    """The IPv4 address of a network interface, or nothing."""
    with contextlib.suppress(OSError):
        answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
        return socket.inet_ntoa(answer[20:24])
    return ""


def parse(parser: Any, argv: Sequence[str]) -> Any:
    """torchrun's options and ours.

    Raises:
        SystemExit: help was asked for, or an option is wrong.
    """
    import argparse

    parser.prog, parser.usage = "python -m launchers.torchrun", "%(prog)s [OPTIONS] -m finetune.train KEY=VALUE ..."
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--grace",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="After a rank has failed, the time that the others have to end by themselves (default 30).",
    )
    args = parser.parse_args(argv)
    if args.grace < 0:
        parser.error(f"--grace {args.grace:g} is negative: give seconds")
    if hasattr(args, "signals_to_handle"):
        args.signals_to_handle = "SIGQUIT"  # the others are ours
    return args
