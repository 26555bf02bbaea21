"""A bounded map over worker processes that keeps the order of its items.

    with Workers(8) as workers:
        for item, result in workers.map(function, items, catch=(PictureError,)):
            ...

Each worker is a fresh interpreter on one end of a socket pair: nothing forks a process that holds torch's
threads, nothing lives in /dev/shm, and a worker imports only what `function` needs. A worker whose parent is
gone, killed even, reads the end of its socket and exits at once; so `function` must have no side effects.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

from finetune import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

_DEPTH = 2  # items a worker has at a time: one in work, one that waits while the result of the first is taken
# What a codec's own mistakes end in. Kills come from outside, and say nothing of the item.
_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}
_SERVE = "import sys; sys.path[:] = sys.argv[2:]; from data_tools.workers import _serve; _serve(int(sys.argv[1]))"
_NUMBER = struct.Struct("<Q")


class CrashError(Exception):
    """An item that twice ended the process of a worker; the text is the reason."""


class RemoteError(Exception):
    """The traceback of an error in a worker, as text; the cause of the error that `map` raises."""


@dataclass
class _Task:
    """An item under way, later with what came of it."""

    item: Any
    done: bool = False
    result: Any = None
    error: BaseException | None = None
    crashes: int = 0


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    socket: socket.socket
    tasks: deque[_Task] = field(default_factory=deque)  # in the order in which results will come
    function: bytes = b""  # the one that it was last told


class Workers:
    """`count` worker processes; with 0 the work is done in this process.

    They start with the first `map`. One `map` at a time, from any one thread.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._workers: list[_Worker] = []
        self._selector: selectors.BaseSelector | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, whatever they do. The next `map` would start new ones."""
        if self._selector is not None:
            self._selector.close()
            self._selector = None
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.socket.close()
        for worker in workers:
            try:
                worker.process.wait(5)
            except subprocess.TimeoutExpired:  # stuck in a codec that doesn't let go of the interpreter
                worker.process.kill()
                worker.process.wait()

    def map(
        self,
        function: Callable[[Item], Result],
        items: Iterable[Item],
        *,
        ahead: int | None = None,
        catch: tuple[type[BaseException], ...] = (),
        name: Callable[[Item], str] | None = None,
    ) -> Iterator[tuple[Item, Result | BaseException]]:
        """(item, function(item)) for each item, in the order of the items.

        Args:
            function: importable by its name (or a `functools.partial` of such a one), without side effects.
            ahead: items taken and not yet given back, at most (default: four a worker): this bounds memory.
            catch: errors that are given back as results. Any other error of `function` is raised here. With
                `CrashError` among them an item on which a codec crashes its process, and a fresh one too, is
                given back with that; otherwise it ends the map.
            name: what to call an item whose worker dies, in the message.

        Raises:
            UserError: a worker was killed from outside, as by the kernel when memory runs out, or has crashed.
        """
        if self.count == 0:
            yield from _inline(function, items, catch)
            return
        self._start()
        ahead = max(ahead if ahead is not None else 4 * self.count, 1)
        told = pickle.dumps((function, catch), protocol=5)
        source, exhausted = iter(items), False
        tasks: deque[_Task] = deque()
        while True:
            while not exhausted and len(tasks) < ahead:
                worker = min(self._workers, key=lambda worker: len(worker.tasks))
                if len(worker.tasks) >= _DEPTH:
                    break
                try:
                    task = _Task(next(source))
                except StopIteration:
                    exhausted = True
                    break
                tasks.append(task)
                worker.tasks.append(task)
                _give(worker, told, task)
            self._receive(told, CrashError in catch, name, wait=bool(tasks) and not tasks[0].done)
            if tasks and tasks[0].done:
                task = tasks.popleft()
                if task.error is not None:
                    raise task.error
                yield task.item, task.result
            elif exhausted and not tasks:
                return

    def _start(self) -> None:
        if self._workers:
            return
        self._selector = selectors.DefaultSelector()
        for _ in range(self.count):
            worker = _Worker(*_new_process())
            self._workers.append(worker)
            self._selector.register(worker.socket, selectors.EVENT_READ, worker)

    def _receive(self, told: bytes, catch_crash: bool, name: Callable[[Any], str] | None, wait: bool) -> None:
        assert self._selector is not None
        for key, _ in self._selector.select(None if wait else 0):
            worker: _Worker = key.data
            try:
                result, error, text = _load(_take(worker.socket))
            except (EOFError, ConnectionResetError):
                self._died(worker, told, catch_crash, name)
                continue
            task = worker.tasks.popleft()
            task.done, task.result, task.error = True, result, error
            if error is not None:
                error.__cause__ = RemoteError("\n" + text)

    def _died(self, worker: _Worker, told: bytes, catch_crash: bool, name: Callable[[Any], str] | None) -> None:
        """Put a fresh process in the place of one that crashed; its item gets one more try."""
        try:
            code = worker.process.wait(5)
        except subprocess.TimeoutExpired:
            code = 0
        at = f" at {name(worker.tasks[0].item)}" if name is not None and worker.tasks else ""
        if code == -signal.SIGKILL:
            raise UserError(
                f"a worker process was killed{at}, most likely for want of memory; take fewer --workers"
            )
        why = f"signal {-code}" if code < 0 else f"exit code {code}"
        if not (catch_crash and -code in _CRASHES and worker.tasks):
            raise UserError(f"a worker process ended ({why}){at}; run it again, with --workers 0 to see more")
        assert self._selector is not None
        self._selector.unregister(worker.socket)
        worker.socket.close()
        worker.process, worker.socket = _new_process()
        worker.function = b""
        self._selector.register(worker.socket, selectors.EVENT_READ, worker)
        task = worker.tasks[0]  # results come in order, so this is the one that was in work
        task.crashes += 1
        if task.crashes > 1:
            worker.tasks.popleft()
            task.done, task.result = True, CrashError(f"it crashes the process that reads it ({why})")
        for task in worker.tasks:
            _give(worker, told, task)


def _new_process() -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(theirs.fileno()), *sys.path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
    return process, ours


def _give(worker: _Worker, told: bytes, task: _Task) -> None:
    """Send an item; of a process that has ended `_receive` will learn, after the results that it left."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        if worker.function is not told:
            _send(worker.socket, ("function", told))
            worker.function = told
        _send(worker.socket, ("item", task.item))


def _inline(
    function: Callable[[Item], Result], items: Iterable[Item], catch: tuple[type[BaseException], ...]
) -> Iterator[tuple[Item, Result | BaseException]]:
    for item in items:
        result: Result | BaseException
        try:
            result = function(item)
        except catch as error:
            result = error
        yield item, result


# --- messages: sizes, a pickle, and the arrays in it as they are


def _send(connection: socket.socket, message: object) -> None:
    for part in _parts(message):
        connection.sendall(part)


def _parts(message: object) -> list[Any]:
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    raws = [buffer.raw() for buffer in buffers]
    sizes = [len(body), *(raw.nbytes for raw in raws)]
    return [b"".join(map(_NUMBER.pack, (len(sizes), *sizes))), body, *raws]


def _take(connection: socket.socket) -> list[bytearray]:
    (count,) = _NUMBER.unpack(_exactly(connection, _NUMBER.size))
    sizes = [size for (size,) in _NUMBER.iter_unpack(_exactly(connection, count * _NUMBER.size))]
    return [_exactly(connection, size) for size in sizes]


def _load(parts: list[bytearray]) -> Any:
    return pickle.loads(parts[0], buffers=parts[1:])


def _exactly(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view, got = memoryview(data), 0
    while got < size:
        count = connection.recv_into(view[got:])
        if count == 0:
            raise EOFError
        got += count
    return data


# --- in the worker


def _serve(fd: int) -> NoReturn:
    """The life of a worker: functions and items in, results out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the socket
    connection = socket.socket(fileno=fd)
    inbox: queue.SimpleQueue[list[bytearray]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()
    function: Callable[[Any], Any] | None = None
    told = b""
    catch: tuple[type[BaseException], ...] = ()
    while True:
        try:
            kind, content = _load(inbox.get())
            if kind == "function":
                told = content
                function = None
                continue
            if function is None:  # here, so that a function that can't be imported is the item's error
                function, catch = pickle.loads(told)
            try:
                result = function(content)
            except catch as error:
                result = _sendable(error)
            message = _parts((result, None, ""))
        except Exception as error:
            message = _parts((None, _sendable(error), traceback.format_exc()))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for part in message:
                connection.sendall(part)


def _listen(connection: socket.socket, inbox: queue.SimpleQueue[list[bytearray]]) -> NoReturn:
    """Take messages at once, so that the parent never waits while it sends one, and see the parent's end."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            inbox.put(_take(connection))
    os._exit(0)


def _sendable(error: BaseException) -> BaseException:
    """The error, or what is left of it if its type doesn't pickle."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
