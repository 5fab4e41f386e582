"""What `bench/cpu.py` and `bench/petals.py` measure with: engines as separate processes that speak lines of JSON.

driver.py         the inner side: reads commands, steps an engine, says when each token came; standard library only
plait_driver.py   plait behind it;  llama_driver.py  llama.cpp;  vllm_driver.py  vLLM: each runs in its own environment
process.py        the outer side: starts, asks, suspends and weighs a process
engines.py        the engines and servers, their settings, and whether they are installed
machine.py        what the machine gives (probe.c) and what others take of it
rounds.py         engines measured in turns;  workloads.py  prompts and lengths;  load.py  requests to a server
checkpoints.py    the model's folders: random weights of its shape, a longer context, vLLM's int8

petals_hivemind.py, petals_server.py, petals_client.py    run in PETALS' environment
petals_swarm.py, plait_swarm.py, llama_rpc.py             servers on loopback, asked and killed: the outer sides
"""
