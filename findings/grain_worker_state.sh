#!/usr/bin/env bash
# grain: an iterator's saved position depends on the number of worker processes.
#
# One would guess: the number of workers only changes the speed. The order of the elements is the
# same for every number of workers. A position saved with 2 workers can be restored with 1 or with
# 4.
# What happens: the order is the same, but the state lists the progress of each worker. With fewer
# workers, restoring raises a KeyError or an IndexError that mentions neither workers nor state.
# With more workers, the iterator first returns wrong elements, and raises an IndexError after
# them.
# Why it matters: a run cannot resume on a machine with another number of cores, and the error does
# not say why. Reading with threads (ReadOptions) stores one index, which fits any number of
# threads.
# Seen with: grain 0.2.18, absl-py 2.5.1, numpy 2.4.6, Python 3.11.
#
# Output:
#   grain 0.2.18
#   the order is the same with 0, 1, 2 and 4 workers: True
#   state after 10 elements with 2 workers: {'next_index_in_cycle': 0, 'next_index_in_datasets': 2,
#       'iterators_in_use_indices': [0, 1], 'iterators_in_use_states': [{'next_index': 5},
#       {'next_index': 5}], 'exhausted': [0, 0], 'future_states': {}}
#     restored with 0 workers, the next three elements: [], KeyError: 'next_index'
#     restored with 1 workers, the next three elements: [], IndexError: list index out of range
#     restored with 2 workers, the next three elements: [10, 11, 12], no error
#     restored with 4 workers, the next three elements: [20, 21], IndexError: list assignment index
#       out of range

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  grain==0.2.18 absl-py==2.5.1 numpy==2.4.6
cd "$work"
unset PYTHONPATH

cat >program.py <<'PY'
import sys
from importlib.metadata import version

import grain
from absl import flags


def iterator(workers):
    elements = grain.MapDataset.range(1000).to_iter_dataset(grain.ReadOptions(num_threads=2))
    if workers:
        elements = elements.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(elements)


def main():
    # Grain reads its absl flags when it starts workers. Unparsed flags would raise an error.
    flags.FLAGS(sys.argv[:1])
    print("grain", version("grain"))
    counts = (0, 1, 2, 4)
    orders = {}
    for workers in counts:
        elements = iterator(workers)
        orders[workers] = [int(next(elements)) for _ in range(10)]
        if workers == 2:
            state = elements.get_state()
        elements.close()
    same = all(order == orders[0] for order in orders.values())
    print("the order is the same with 0, 1, 2 and 4 workers:", same)
    print("state after 10 elements with 2 workers:", state)
    fits = {}
    for workers in counts:
        elements, found = iterator(workers), []
        try:
            elements.set_state(state)
            for _ in range(3):
                found.append(int(next(elements)))
            outcome = "no error"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        elements.close()
        fits[workers] = found == [10, 11, 12]
        print(f"  restored with {workers} workers, the next three elements: {found}, {outcome}")
    if fits != {0: False, 1: False, 2: True, 4: False}:
        sys.exit("the behaviour changed: other worker counts accept the state of 2")


if __name__ == "__main__":
    main()
PY
"$work/venv/bin/python" program.py
