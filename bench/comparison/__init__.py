"""Serving policies compared: static batching, ORCA, vLLM's pages, DistKV-LLM's loans, and all of them together.

policies.py     what is compared, by name
cases.py        models on machines with lengths: one GPU server at the papers' scale, unequal machines
point.py        one simulated run, in numbers; observed.py: what has to be seen while it runs; fairness.py: who waits
series.py       a policy's runs at rising rates, for each case and seed, in several processes
curves.py       medians over seeds, the rate that a latency allows, ratios
sharing.py      memory that samples and beams share, swapping against recomputing, sizes of blocks
claims.py       what the papers state, beside what was found
live.py         the same policies live with the small model, and simulated with its measured costs
"""
