#!/usr/bin/env bash
# Starts training on every worker of a TPU VM, or goes on where it runs. It outlives this connection; see logs.sh, status.sh.
#
#   launch/tpu_vm/run.sh --name=run1 --zone=us-west4-a --config=configs/qwen3_vl_4b.py --workdir=/mnt/maestro/run1 \
#     [-- --config.grpo.steps=100]
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
a_tpu_vm
required config "config file of the run, below the repository"
required workdir "directory of the run, the same for all workers: below /mnt/maestro"
settings_from "$@"

job=(.venv/bin/python -m maestro_jax.train "--config=$CONFIG" "--workdir=$WORKDIR" "${REST[@]}")
run gcloud compute tpus tpu-vm ssh "$NAME" "${PLACE[@]}" --worker=all \
  "--command=$(quoted bash maestro/launch/tpu_vm/worker.sh start "${job[@]}")"
