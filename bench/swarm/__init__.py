"""What the benchmarks of swarms measure with: real processes on loopback, each a machine of its own.

processes.py   a gateway and members as processes: started, killed, frozen, started again
stream.py      one streamed answer: its tokens and when each came
"""
