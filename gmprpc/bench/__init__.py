"""Load on a server, and what it made of it: what ``gmprpc bench`` runs.

It makes no calls as a client does: requests are encoded before the load begins, and each answer is compared with the
one that is expected. What a call costs here has to be less than what it costs the server.
"""
