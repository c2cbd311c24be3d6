#!/usr/bin/env bash
# What `pytest -m slow tests/launch/test_slurm.py` needs of the system (Debian, Ubuntu); nothing is started.
set -euo pipefail
apt-get install --yes --no-install-recommends slurm-wlm munge
