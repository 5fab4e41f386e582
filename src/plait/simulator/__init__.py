"""What would happen on machines that one does not have: live code on a virtual clock, in two ways.

The live system's coroutines on a virtual clock (virtual_loop.py), which live through faults:
  trial.py               one trial, and all that is checked in it; trial_report.py: what became of it
  fault_schedule.py      what goes wrong, drawn from a seed; havoc.py, faulty_network.py: carry it out
  trial_swarm.py         its machines (machine.py); hash_model.py: a model that forgives nothing
  invariants.py          what must hold after every event; watched_engine.py, recovery_watch.py: see what happens

The live system's decisions on a heap of events, for policies and capacity:
  cluster_run.py         a run: requests arrive, end, wait, and move off machines that are gone
  event_heap.py          what happens next; random_streams.py: random numbers by name
  simulated_worker.py    a live scheduler, and a cost model in place of an engine
  simulated_gateway.py   the live router, and what the machines announce
  simulated_lending.py   KV memory that machines lend each other; simulated_lender.py: one's end, with the live agent
  simulated_network.py   links; data_path.py: how requests (flight.py) flow over machines
  faults_of_run.py       what breaks when; cluster_faults.py: carries it out
  cluster_trial.py       all of it drawn from a seed; buggify.py: rare branches, often; shrinking.py: a failure's core
  replay.py              a recorded live run again, with the times that its steps took
  outcomes.py            what became of requests; report.py: that in numbers; timeline.py: as a Chrome trace
  scenario.py            all of it from a YAML file (scenario_run.py builds the run); scenarios/: examples
"""

from plait.simulator.cluster_run import ClusterRun, RunOptions
from plait.simulator.event_heap import EventFailed, EventHeap, EventKind
from plait.simulator.faults_of_run import FAULT_KINDS, FaultRate, RunFault, draw_faults
from plait.simulator.outcomes import Outcomes
from plait.simulator.random_streams import stream
from plait.simulator.replay import (
    Decision,
    DecisionLog,
    RecordedRequest,
    RecordedStep,
    Replayed,
    decision_of,
    replay,
    work_of,
)
from plait.simulator.report import attained, latency_samples, lending_of, longest_context_tokens, report_of
from plait.simulator.scenario import Scenario, load_scenario, parse_scenario
from plait.simulator.scenario_run import objectives_of, run_of_scenario
from plait.simulator.simulated_lender import LendingSpec, LendingTotals
from plait.simulator.simulated_network import LinkSpec, NetworkSpec
from plait.simulator.simulated_worker import MachineSpec, SimulatedWorker
from plait.simulator.timeline import Timeline
from plait.simulator.virtual_loop import Deadlock, Livelock, Process, VirtualLoop, run_virtual

__all__ = [
    "FAULT_KINDS",
    "ClusterRun",
    "Deadlock",
    "Decision",
    "DecisionLog",
    "EventFailed",
    "EventHeap",
    "EventKind",
    "FaultRate",
    "LendingSpec",
    "LendingTotals",
    "LinkSpec",
    "Livelock",
    "MachineSpec",
    "NetworkSpec",
    "Outcomes",
    "Process",
    "RecordedRequest",
    "RecordedStep",
    "Replayed",
    "RunFault",
    "RunOptions",
    "Scenario",
    "SimulatedWorker",
    "Timeline",
    "VirtualLoop",
    "attained",
    "decision_of",
    "draw_faults",
    "latency_samples",
    "lending_of",
    "load_scenario",
    "longest_context_tokens",
    "objectives_of",
    "parse_scenario",
    "replay",
    "report_of",
    "run_of_scenario",
    "run_virtual",
    "stream",
    "work_of",
]
