#!/usr/bin/env bash
# What happens on a worker of a TPU VM; the other scripts of this folder call it through ssh.
#
#   worker.sh setup [SERVER:/SHARE]   environment in ~/maestro/.venv, share at /mnt/maestro
#   worker.sh start COMMAND...        as a service, which gets SIGTERM and time to save when the machine goes down
#   worker.sh status                  idle, running, or the exit code
#   worker.sh logs [--follow]
#   worker.sh stop                    SIGTERM, then waits until it has saved
set -euo pipefail

readonly UNIT=maestro.service HOUSE=$HOME/maestro MOUNT=/mnt/maestro
readonly TIME_TO_SAVE=300 # seconds
readonly PACKAGES=(nfs-common libgl1 libglib2.0-0) # what mounts the share, and what opencv loads

# A fresh machine updates itself and holds apt's locks for minutes; apt waits for one of them, not for the other.
install_packages() {
  local attempt apt=(sudo env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=600)
  ! dpkg --status "${PACKAGES[@]}" >/dev/null 2>&1 || return 0
  for ((attempt = 0; attempt < 60; attempt++)); do
    if "${apt[@]}" update && "${apt[@]}" install --yes "${PACKAGES[@]}"; then return; fi
    sleep 10
  done
  echo "error: ${PACKAGES[*]} could not be installed on $(hostname), as said above" >&2
  return 70
}

# A user has another number on each worker, and NFS compares numbers: what one of them writes has to be open to all.
mount_share() {
  if ! mountpoint -q "$MOUNT"; then
    sudo mkdir -p "$MOUNT"
    sudo mount -t nfs -o hard "$1" "$MOUNT"
  fi
  [[ $(stat --format=%a "$MOUNT") == *777 ]] || sudo chmod 777 "$MOUNT"
}

setup() {
  [[ ! -e $HOME/maestro.env ]] || chmod 600 "$HOME/maestro.env"
  install_packages
  ((!$#)) || mount_share "$1"
  cd "$HOUSE"
  local wanted
  wanted=$(cat requirements.txt setup.py | sha256sum)
  if [[ $(cat .venv/made-of 2>/dev/null) != "$wanted" ]]; then
    printf '%s installs; this takes minutes\n' "$(hostname)"
    # The images come with an older Python than the package needs; uv brings one.
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --clear --python 3.11 .venv
    python3 -m uv pip install --quiet --python .venv/bin/python -r requirements.txt -e '.[tpu,gcs,suite,sandbox]'
    printf '%s\n' "$wanted" >.venv/made-of
  fi
  printf '%s is ready\n' "$(hostname)"
}

property() { systemctl show --property="$1" --value "$UNIT"; }

status() {
  if [[ $(property LoadState) == not-found ]]; then
    echo idle
  elif [[ $(property SubState) == @(exited|failed|dead) ]]; then
    # ExecMainCode is 1 for an exit, else the status is the signal that ended it.
    if [[ $(property ExecMainCode) == 1 ]]; then property ExecMainStatus; else echo $((128 + $(property ExecMainStatus))); fi
  else
    echo running
  fi
}

start() {
  if [[ $(status) == running ]]; then
    echo "runs already"
    return
  fi
  # The record of how the last run ended makes room.
  sudo systemctl stop "$UNIT" 2>/dev/null || true
  sudo systemctl reset-failed "$UNIT" 2>/dev/null || true
  # SIGTERM goes to the run alone, which may save before share and network go; the TPU's driver may lock memory.
  local keys=()
  [[ ! -e $HOME/maestro.env ]] || keys=(--property="EnvironmentFile=$HOME/maestro.env")
  sudo systemd-run --unit="$UNIT" --uid="$USER" --working-directory="$HOUSE" --remain-after-exit \
    --property=KillMode=mixed --property="TimeoutStopSec=$TIME_TO_SAVE" --property="RequiresMountsFor=$MOUNT" \
    --property=After=network-online.target --property=LimitMEMLOCK=infinity --property=UMask=0000 \
    --setenv=PYTHONUNBUFFERED=1 "${keys[@]}" "$@"
}

logs() { sudo journalctl --unit="$UNIT" --output=cat --lines=200 "$@"; }

stop() {
  if [[ $(status) == running ]]; then sudo systemctl stop "$UNIT"; fi
  status
}

case ${1-} in
  setup | start | status | logs | stop) "$@" ;;
  *)
    echo "error: unknown command ${1-}; the head of $0 lists them" >&2
    exit 78
    ;;
esac
