"""The soak: clients that call for long, through every fault there is, and whether anything is lost or left behind.

Run ``python -m tests.soak --help``.
"""
