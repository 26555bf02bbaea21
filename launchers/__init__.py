"""Starting runs: `torchrun`, `slurm`, and accelerate's files. No setting of a model or of training lives here."""
