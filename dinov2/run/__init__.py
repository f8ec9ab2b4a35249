"""Launchers: the commands of `train` and `eval` as jobs of a SLURM cluster."""
