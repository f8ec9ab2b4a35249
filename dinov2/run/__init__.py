"""Launchers that submit the commands of `train` and `eval` as SLURM jobs, and a view of runs."""
