"""Tokenizes documents in parallel processes, in order. Nothing here imports jax."""

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

import numpy as np

from sngpt_jax.base.errors import UserError
from sngpt_jax.data.tokenizer import Tokenizer, load_tokenizer

_CHUNK_CHARACTERS = 2**17  # text that a worker gets at a time: about a tenth of a second's work
# for each worker: one in work, the others so that it need not wait for the writer
_CHUNKS_IN_FLIGHT = 3

# the first document's number, counted from 1 as lines are; the documents
Chunk = tuple[int, list[str]]
# of each document: tokens uint16 [n], byte corrections int64 [m, 2]
Encoded = list[tuple[np.ndarray, np.ndarray]]

_worker_tokenizer: Tokenizer  # in a worker process


def follow_parent() -> None:
    """Lets this process end with its parent, and only then: Ctrl-C is the parent's to act on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it reaches the whole group
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:  # a pool's worker would wait for ever for a parent that was killed
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def holding_interrupt() -> Iterator[None]:
    """Holds Ctrl-C back until the end of the block. A process started in it never sees one, where
    `follow_parent` alone would leave it the seconds of its imports. Unlike an ignored signal, none
    is lost, and any thread may do this."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(tokenizer: str) -> None:
    global _worker_tokenizer
    follow_parent()
    _worker_tokenizer = load_tokenizer(Path(tokenizer))


def _work(source: str, chunk: Chunk) -> Encoded:
    return _encode(_worker_tokenizer, source, chunk)


def _encode(tokenizer: Tokenizer, source: str, chunk: Chunk) -> Encoded:
    first, texts = chunk
    encoded = []
    for number, text in enumerate(texts, first):
        try:
            document = tokenizer.encode_document(text)
        except Exception as error:
            raise UserError(
                f"{source}: document {number} cannot be tokenized: {type(error).__name__}: {error}"
            ) from error
        encoded.append((np.asarray(document.tokens, np.uint16), document.extra))
    return encoded


def cut_chunks(texts: Iterable[str], first: int) -> Iterator[Chunk]:
    """`texts`, numbered from `first`, in runs of about `_CHUNK_CHARACTERS` characters: each with
    its first number.
    """
    chunk: list[str] = []
    size = 0
    for number, text in enumerate(texts, first):
        chunk.append(text)
        size += len(text)
        if size >= _CHUNK_CHARACTERS:
            yield number + 1 - len(chunk), chunk
            chunk, size = [], 0
    if chunk:
        yield number + 1 - len(chunk), chunk


def _in_order(
    pool: ProcessPoolExecutor, workers: int, source: str, chunks: Iterator[Chunk]
) -> Iterator[Encoded]:
    pending: deque[Future[Encoded]] = deque()
    try:
        for chunk in chunks:
            with holding_interrupt():  # the first ones start the workers
                pending.append(pool.submit(_work, source, chunk))
            if len(pending) == workers * _CHUNKS_IN_FLIGHT:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a tokenizing process was killed, perhaps for memory; run it again with fewer --workers"
        ) from None


Encoder = Callable[[str, Iterator[Chunk]], Iterator[Encoded]]


@contextlib.contextmanager
def encoder(tokenizer: Path, workers: int) -> Iterator[Encoder]:
    """A function from chunks to their tokens, in order; with one worker it runs in this process."""
    if workers == 1:
        here = load_tokenizer(tokenizer)
        yield lambda source, chunks: (_encode(here, source, chunk) for chunk in chunks)
        return
    # fork would copy the locks of whatever threads the caller has
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(str(tokenizer),)
    )
    try:
        yield partial(_in_order, pool, workers)
    finally:
        pool.shutdown(cancel_futures=True)
