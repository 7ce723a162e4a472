"""The plots that the README shows, drawn from the JSON of a benchmark and nothing else."""
