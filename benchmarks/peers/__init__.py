"""Other implementations, each in a virtual environment and a process of its own.

`environment.py` makes the environment, `worker.py` talks to the process; `trl_worker.py` and `tunix_worker.py` are what
runs in it, on top of `protocol.py`. Workers import nothing of the package.
"""
