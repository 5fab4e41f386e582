"""How far the simulator is from the engine: what `bench/fidelity.py` runs.

workloads.py   traces, models, configurations
live.py        runs on the serving path, with a record
simulated.py   the same on the event heap; calibration
levels.py      from runs to figures and their floors
runs.py        all runs of one command
page.py        docs/fidelity.md from the results
"""
