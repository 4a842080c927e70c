"""Runs the .cu sources on the CPU; see README.md."""
