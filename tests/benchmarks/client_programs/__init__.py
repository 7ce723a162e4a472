"""One small program for each library, which calls `echo` as that library's users would and says what it found.

Each runs in the virtual environment of its library, by ``python -m``; ``clients.py`` starts them.
"""
