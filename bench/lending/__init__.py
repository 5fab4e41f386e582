"""What the measurement of lending between real processes is made of.

model.py       a random Llama whose attention matters, on the disk
small_pools.py a gateway and machines whose pools of KV blocks are small: `plait serve` and `plait join` on loopback
asking.py      requests, the tokens that one machine with enough memory gives, and clients that follow a trace
"""
