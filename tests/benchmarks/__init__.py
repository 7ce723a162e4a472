"""Measures gmprpc beside its peers, as real processes on cores of their own choosing; nothing here is a test.

``python -m tests.benchmarks`` measures, ``python -m tests.benchmarks.report FILE`` prints what was measured before.
"""
