"""The siege: what no peer may do to a server, done to one that runs as a process of its own, and measured.

Run ``python -m tests.siege --help``. The peers are raw sockets that know nothing of gmprpc's client.
"""
