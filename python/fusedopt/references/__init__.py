"""Float64 NumPy references, one module each; ``fusedopt.reference`` re-exports them."""
