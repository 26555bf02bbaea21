"""What the agents of the other nodes say."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any

from finetune import PEER_LOST
from launchers.torchrun.failures import Failure

_UNREACHABLE_SECONDS = 120.0  # without an answer from the other nodes, before local workers are ended


class Others:
    """What the agents of the other nodes say, asked for in a thread: who failed, who waits to join.

    Args:
        handler: torch's rendezvous handler.
        store: gives the present store, which a restart may replace.

    Attributes:
        waiting: number of nodes that wait to join, as torch's agent asks for it.
    """

    def __init__(self, handler: Any, store: Callable[[], Any]) -> None:
        self.waiting = 0
        self._num_nodes_waiting, self._store = handler.num_nodes_waiting, store
        self._key: str | None = None
        self._telling: Failure | None = None
        self._told: Failure | None = None
        self._heard = time.monotonic()
        self._stopped = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="others", daemon=True)

    def watch(self, key: str) -> None:
        """Go by what is under `key` of the present store."""
        self._key, self._telling, self._told, self._heard, self.waiting = key, None, None, time.monotonic(), 0
        if not self._thread.is_alive():
            self._thread.start()

    def tell(self, failure: Failure) -> None:
        """Let the other nodes know of a failure on this one, soon."""
        self._telling = failure
        self._wake.set()

    def failure(self) -> Failure | None:
        """The first one that any node told of, or that the store is gone."""
        if self._told is None and time.monotonic() - self._heard > _UNREACHABLE_SECONDS:
            return Failure(-1, "the node that holds the rendezvous store", PEER_LOST)
        return self._told

    def stop(self) -> None:
        """Say what is left to say, for two seconds at most."""
        self._stopped = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(2)

    def _ask(self) -> None:
        while True:
            key, store, telling, stopped = self._key, self._store(), self._telling, self._stopped
            with contextlib.suppress(Exception):  # a store that is gone: `failure` counts the seconds
                if telling is not None:
                    text = json.dumps([telling.rank, telling.host, telling.code])
                    if telling.code == PEER_LOST:  # a witness: what is there already says more
                        store.compare_set(key, "", text)
                    else:
                        store.set(key, text)
                    self._telling = None
                elif store.check([key]):
                    told = Failure(*json.loads(store.get(key)))
                    if key == self._key:
                        self._told = told
                if not stopped:
                    self.waiting = self._num_nodes_waiting()
                self._heard = time.monotonic()
            if stopped:
                return
            self._wake.wait(1)
            self._wake.clear()
