"""Real training, preparation and export processes that are broken on purpose, and what must be
left of them.

    python -m tests.faults --kills 20 --seed 0 --markdown docs/reliability.md

`lab.py` has what the scenarios share, `inject.py` what a process does to itself; the other modules
hold the scenarios, each of which gives a row of the table in docs/reliability.md. `test_faults.py`
runs a short form.
"""
