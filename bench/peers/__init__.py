"""What `bench/cpu.py` measures with: engines as separate processes that all speak the same lines of JSON.

driver.py         the inner side: reads commands, steps an engine, says when each token came; standard library only
plait_driver.py   plait behind it;  llama_driver.py  llama.cpp;  vllm_driver.py  vLLM: each runs in its own environment
process.py        the outer side: starts, asks, suspends and weighs a process
engines.py        the engines and servers, their settings, and whether they are installed
machine.py        what the machine gives (probe.c) and what others take of it
workloads.py      prompts and lengths
checkpoints.py    the model's folders: random weights of its shape, a longer context, vLLM's int8
"""
