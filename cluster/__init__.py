"""Clusters: a local one for one job (`python -m cluster run`), and the files for Slurm and Kubernetes."""
