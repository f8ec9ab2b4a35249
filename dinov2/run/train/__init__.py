"""Submit training as a SLURM job."""
