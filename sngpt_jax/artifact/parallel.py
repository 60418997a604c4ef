"""Jobs in threads, the largest first. The codecs and numpy run without Python's global lock."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

T = TypeVar("T")
Progress = Callable[[int, int], None]  # called with the numbers of finished and of all jobs


def in_threads(
    jobs: Sequence[tuple[int, Callable[[], T]]],
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[T]:
    """The results of jobs (size, call) in their order, by `threads` threads or one per processor.
    Raises the first error of a job and drops the jobs that have not begun.
    """
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        order = sorted(range(len(jobs)), key=lambda i: -jobs[i][0])
        futures = {i: pool.submit(jobs[i][1]) for i in order}
        try:
            for done, future in enumerate(as_completed(futures.values()), 1):
                future.result()
                if progress:
                    progress(done, len(jobs))
        finally:
            pool.shutdown(cancel_futures=True)
        return [futures[i].result() for i in range(len(jobs))]
