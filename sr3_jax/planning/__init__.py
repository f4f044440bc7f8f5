"""Plans of training jobs on a topology: memory, FLOPs, and changes that make a job fit."""
