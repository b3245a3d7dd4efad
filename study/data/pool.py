"""Work that is spread over all cores, its results in the order of what was given."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, TypeVar

from study.files import StudyError

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Items that the process itself works on before others are started, which takes longer than that.
ALONE = 8


class Pool:
    """Calls ``work(shared, item)`` in as many processes as there are cores for this one (affinity counts).

    At most two items a process are waiting, so memory does not grow with their number; short work stays in this
    process. What is given to others has to be picklable, ``work`` a function of a module.
    """

    def __init__(self, work: Callable[[Any, Item], Result], shared: Any, processes: int | None = None):
        from study.runtime import cores  # with PyTorch, which the others do without

        self.work, self.shared, self.processes = work, shared, processes or cores()
        self._alone = ALONE if self.processes > 1 else None
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._executor:
            self._executor.shutdown(cancel_futures=True)

    def map(self, items: Iterable[Any]) -> Iterator[Any]:
        """Results in the order of the items, which are asked for as they are needed.

        Raises:
            StudyError: a process was ended from outside, as where memory is short.
        """
        waiting: deque[Future] = deque()
        for item in items:
            if self._alone is None or self._alone > 0:
                self._alone = self._alone and self._alone - 1
                yield self.work(self.shared, item)
                continue
            waiting.append(self._others().submit(_work, item))
            if len(waiting) >= 2 * self.processes:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())

    def _others(self) -> ProcessPoolExecutor:
        if self._executor is None:
            context = multiprocessing.get_context("spawn")  # a fork may inherit a lock that nobody opens
            arguments = (self.work, self.shared)
            self._executor = ProcessPoolExecutor(self.processes, context, _begin, arguments)
        return self._executor


_own: tuple[Callable[[Any, Any], Any], Any]


def _begin(work: Callable[[Any, Any], Any], shared: Any) -> None:
    global _own
    _own = work, shared
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    connection.wait([parent.sentinel])
    os._exit(1)


def _work(item: Any) -> Any:
    work, shared = _own
    return work(shared, item)


def _result(future: Future) -> Any:
    try:
        return future.result()
    except BrokenProcessPool:
        raise StudyError("a process that prepares text was ended from outside; is memory short?") from None
