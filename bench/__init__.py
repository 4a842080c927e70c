"""Benchmarks: ``python -m bench NAME`` runs ``bench/NAME.py`` on the shared harness.

A benchmark is one file with ``CASES``, ``VARIANTS``, ``QUICK`` and ``cases(options)``, a generator
of :class:`bench.harness.timing.Case`; timing, tables, JSON and plots are the harness's.
"""
