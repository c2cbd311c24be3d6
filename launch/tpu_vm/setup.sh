#!/usr/bin/env bash
# Brings the last commit and its environment onto every worker of a TPU VM. Where that is done already it takes seconds.
#
#   launch/tpu_vm/setup.sh --name=run1 --zone=us-west4-a --share=10.0.0.2:/maestro [--keys=keys.env]
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
a_tpu_vm
optional share "" "SERVER:/SHARE (NFS, such as Filestore) that every worker mounts at /mnt/maestro"
optional keys "" "file of NAME=VALUE lines: the experts' API keys"
optional config "" "config file of the run, which has to be committed; empty: not looked at"
a_patient_command
settings_from "$@"

[[ -z $KEYS || -r $KEYS ]] || fail "$CONFIGURATION" "--keys=$KEYS cannot be read; name a file of NAME=VALUE lines"
[[ -n $SHARE ]] || note "warning: without --share, work directories are on the workers' own disks and are deleted with them"
check_commit
bundle=${TMPDIR:-/tmp}/maestro-$NAME.tar.gz
run git -C "$(dirname "$LAUNCH")" archive --format=tar.gz "--output=$bundle" HEAD
everywhere scp "$bundle" "$NAME:maestro.tar.gz"
[[ -z $KEYS ]] || everywhere scp "$KEYS" "$NAME:maestro.env"
unpack='mkdir -p maestro && tar -xzf maestro.tar.gz -C maestro'
everywhere ssh "$NAME" "--command=$unpack && $(quoted bash maestro/launch/tpu_vm/worker.sh setup ${SHARE:+"$SHARE"})"
