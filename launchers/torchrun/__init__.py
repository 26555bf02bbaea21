"""`torchrun` with exit codes that mean something: `python -m launchers.torchrun [OPTIONS] -m finetune.train ...`.

It is torch's own agent (torch.distributed.run) in all but four things, which a job's script relies on: the exit
code is the workers', signals are passed on to the workers and waited for, a failure on one node ends the job on all
of them in bounded time, and one line says which rank failed first, and how.

command         options, the way to the other nodes, and the exit code
signals         passed on, from before torch is imported
agent           torch's agent with these differences
others          what the agents of the other nodes say
failures        who failed, and the exit code of all from those of the workers
"""
