"""The `plait` command: read settings, build everything, start one thing.

app.py        the commands, and how an error of ours ends one
flags.py      flags made from the tree of settings
options.py    settings into the plain options of the packages that are started
terminal.py   lines, tables, JSON and progress bars; logs
serving.py    an HTTP server from socket to graceful end: what `serve`, `demo` and `chat` stand on
serve.py      plait serve
up.py         plait up: a gateway here, its workers on Ray (ray_cluster.py; ray_worker.py is one of them)
demo.py       plait demo: serve the embedded model and ask it something
miniature.py  its swarm: plait join processes of this machine, which end with it (leash.py)
outlive.py    plait demo --kill: an answer that outlives a machine
chat.py       plait chat
generate.py   plait generate
bench.py      plait bench serve
models.py     plait models, plait pull
keys.py       plait token: API keys and where they are kept
show_settings.py  plait settings
doctor.py     plait doctor: what this machine can do, and why not
machine.py    what there is to know about this machine, without torch
"""

from plait.cli.app import app, main

__all__ = ["app", "main"]
