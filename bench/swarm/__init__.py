"""What the benchmarks of swarms measure with: real processes on loopback, each a machine of its own.

processes.py   a gateway and members as processes: started, killed, frozen, started again
route_log.py   the chain of every request, from gateways' logs
stream.py      one streamed answer: its tokens and when each came
unequal.py     machines of different speeds at different distances: a model with random weights, and who is where
conditions.py  those speeds and distances, as each process reads them
slowed.py      `plait` under such conditions: its links are longer and its forward passes take longer
crowd.py       clients that ask one answer after the other; three_places.py  eight unequal workers, and where they are
"""
