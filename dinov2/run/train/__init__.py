"""Training as a SLURM job."""
