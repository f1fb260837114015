"""Jobs of training and data preparation under Slurm: scripts, submissions, and what became of them."""
