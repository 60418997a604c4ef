"""Tokenizes documents in parallel processes, in order."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

from sngpt_jax.base.errors import UserError
from sngpt_jax.data.manifest import explained
from sngpt_jax.data.tokenizer import Document, Tokenizer, load_tokenizer

_CHUNK_CHARACTERS = 2**17  # of text for one task of a worker: about 0.1 s of work
_CHUNKS_IN_FLIGHT = 3  # per worker: one in work and two that wait for it

Chunk = list[tuple[int, str]]  # documents with their numbers, counted from 0
Encoded = list[Document]

_worker_tokenizer: Tokenizer  # in a worker process


def usable_cpus() -> int:
    """The processors that this process may use, which a batch scheduler limits."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def follow_parent() -> None:
    """Ends this process with its parent, which alone acts on the Ctrl-C that both receive."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:  # otherwise a worker would wait forever for a killed parent
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def holding_interrupt() -> Iterator[None]:
    """Holds Ctrl-C back until the end of the block. No signal is lost, and any thread may do this.

    A process that is started in the block never receives one. `follow_parent` alone would leave
    the worker exposed during the seconds of its imports.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(tokenizer: Path) -> None:
    global _worker_tokenizer
    follow_parent()
    _worker_tokenizer = load_tokenizer(tokenizer)


def _work(source: str, chunk: Chunk) -> Encoded:
    return _encode(_worker_tokenizer, source, chunk)


def _encode(tokenizer: Tokenizer, source: str, chunk: Chunk) -> Encoded:
    """The documents of a chunk; an error names the document."""
    encoded: Encoded = []
    with explained(lambda: f"{source}: document {chunk[len(encoded)][0] + 1} cannot be tokenized"):
        for _, text in chunk:
            encoded.append(tokenizer.encode_document(text))
    return encoded


def cut_chunks(texts: Iterable[tuple[int, str]]) -> Iterator[Chunk]:
    """Cuts numbered `texts` into runs of about `_CHUNK_CHARACTERS` characters."""
    chunk: Chunk = []
    size = 0
    for number, text in texts:
        chunk.append((number, text))
        size += len(text)
        if size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _in_order(
    pool: ProcessPoolExecutor, workers: int, source: str, chunks: Iterator[Chunk]
) -> Iterator[Encoded]:
    """The tokens of `chunks` in their order, by at most `workers` processes."""
    pending: deque[Future[Encoded]] = deque()
    try:
        for chunk in chunks:
            with holding_interrupt():  # the first calls start the workers
                pending.append(pool.submit(_work, source, chunk))
            if len(pending) == workers * _CHUNKS_IN_FLIGHT:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        killed = "a tokenizing process was killed, perhaps for memory"
        raise UserError(f"{killed}; resume with fewer --workers") from None


Encoder = Callable[[str, Iterator[Chunk]], Iterator[Encoded]]


@contextlib.contextmanager
def encoder(tokenizer: Path, workers: int) -> Iterator[Encoder]:
    """Yields a function from chunks to their tokens, in order. One worker runs in this process."""
    if workers == 1:
        here = load_tokenizer(tokenizer)
        yield lambda source, chunks: (_encode(here, source, chunk) for chunk in chunks)
        return
    context = multiprocessing.get_context("spawn")  # fork would copy the locks of threads
    pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer,))
    try:
        yield partial(_in_order, pool, workers)
    finally:
        pool.shutdown(cancel_futures=True)
