"""Jobs in threads, the largest first. The codecs and numpy run without Python's global lock."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

T = TypeVar("T")
Progress = Callable[[int, int], None]  # is called with the number of finished jobs and of all jobs


def in_threads(
    jobs: Sequence[tuple[int, Callable[[], T]]],
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[T]:
    """The results of jobs (size, call) in the order of `jobs`. Raises the first error of a job and
    drops the jobs that have not begun.

    `threads` None: one per processor.
    """
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        largest_first = sorted(range(len(jobs)), key=lambda i: -jobs[i][0])
        futures = {i: pool.submit(jobs[i][1]) for i in largest_first}
        try:
            for done, future in enumerate(as_completed(futures.values()), 1):
                future.result()
                if progress:
                    progress(done, len(jobs))
        finally:
            pool.shutdown(cancel_futures=True)
        return [futures[i].result() for i in range(len(jobs))]
