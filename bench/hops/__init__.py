"""What the benchmark of the data path measures with.

hop_worker.py   one machine of the swarm, as `plait join` runs it, with clocks that are read over a pipe
part_clock.py   CPU time of the parts of the data path
wide_model.py   the model: wide, and nearly empty
"""
