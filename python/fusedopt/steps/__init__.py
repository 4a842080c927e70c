"""The functional steps, one module each. Nothing is re-exported: no function hides its module."""
