"""Training under Slurm.

`train.sbatch` is the job, usable by itself; `node` is its part on each node; `python -m launchers.slurm` checks,
submits and follows.
"""
