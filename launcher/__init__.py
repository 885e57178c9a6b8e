"""Run the stages of the pipeline as jobs: local processes here, a Slurm cluster elsewhere. Loads no torch."""
