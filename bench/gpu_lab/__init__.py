"""What ``bench/gpu_lab.sh`` runs. Only the steps that need torch import it."""
