"""examples/finetune.py for torchrun, on a small library: FUNCTIONS, then each run's arguments, runs separated by '+'.

With FAULT=kill the last process kills itself while the second checkpoint is written; with FAULT=interrupt Ctrl-C comes
to each process in its third step, as a terminal sends it.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import finetune
import torch
import torch.distributed.checkpoint as dcp
from study import learner, processes
from study.data import functions

torch.set_num_threads(1)
if processes.WORLD > 1:
    torch.distributed.init_process_group("gloo")  # once for all runs
folder, *arguments = sys.argv[1:]
pairs = functions.load(Path(folder))
functions.load = lambda: pairs
fault, save, step, calls = os.environ.get("FAULT"), dcp.save, learner.Learner.step, []


def save_or_die(*args, **kwargs):
    calls.append(1)
    if len(calls) == 2 and processes.RANK == processes.WORLD - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return save(*args, **kwargs)


def step_or_interrupt(self, shares):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return step(self, shares)


if fault == "kill":
    dcp.save = save_or_die
elif fault == "interrupt":
    learner.Learner.step = step_or_interrupt
status, run = 0, []
for argument in [*arguments, "+"]:
    if argument == "+":
        status, run = status or finetune.main(run), []
    else:
        run.append(argument)
sys.exit(status)
