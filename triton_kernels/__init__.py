"""Triton kernels, one module for each algorithm; installed as ``fusedopt.triton_kernels``.

Importing this package does not import triton; its modules do, and need torch too, through which
triton finds the device and the stream.
"""
