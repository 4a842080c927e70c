"""What every benchmark shares: timing, canary, answer check, floor, report."""
