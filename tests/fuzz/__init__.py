"""Fuzzing of the decoder and of a live connection; `python -m tests.fuzz --help` shows how."""
