"""Counts the instructions that a call takes, with valgrind, and fails when they have grown: a guard without a clock.

``python -m tests.benchmarks.instructions`` measures the gmprpc that is installed, or the one that PYTHONPATH leads to.

What takes longer takes more instructions as a rule, and those can be counted on a busy machine as well: the same
program takes the same number again, but for a few in a million. Paths of another length, which move all that lies in
memory, make 0.3 %, and 1 % where two names fall on the same place in Python's cache of attributes. What the kernel does
isn't counted, nor what waiting for memory costs; and in the cases with one call in flight the peer, and the loop that
goes round for it, are a fifth of what is. So this doesn't replace the benchmark.

Each number is compared with the baseline for the same Python in ``baselines.json``. Another build of Python, or another
release of gevent or msgpack, takes other numbers, without a change here. So pieces of work that gmprpc has no part in,
the references, are measured in the same way and stand with each baseline: what is allowed is

    baseline x (reference now / reference then) x 1.05

There is one for large messages, too, since copying hardly changes with a build. Debian's Python 3.11, compiled in
another way, comes within 3 % of what pyenv's lets expect. With the build that the baseline was written with the
references are the same; tox pins the releases for that.

A change that is meant to take more, or that takes much less, renews the baselines: ``tox -e py311-instructions --
--write``, and the same for the other versions of Python.
"""
