#!/usr/bin/env bash
# Starts training on every worker of a TPU VM, or goes on where it runs. It outlives this connection; see logs.sh, status.sh.
#
#   launch/tpu_vm/run.sh --name=run1 --zone=us-west4-a --accelerator=v5litepod-64 --config=configs/qwen3_vl_4b.py \
#     --workdir=/mnt/maestro/run1 [-- --config.grpo.steps=100]
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
a_tpu_vm
required config "config file of the run, below the repository"
required workdir "directory of the run, the same for all workers: below /mnt/maestro"
optional accelerator "" "such as v5litepod-64, for the flags of its chip in launch/env; empty: none"
a_patient_command
settings_from "$@"

job=(env "MAESTRO_CHIP=$(chip)" launch/with_flags.sh
  .venv/bin/python -m maestro_jax.train "--config=$CONFIG" "--workdir=$WORKDIR" "${REST[@]}")
everywhere ssh "$NAME" "--command=$(quoted bash maestro/launch/tpu_vm/worker.sh start "${job[@]}")"
