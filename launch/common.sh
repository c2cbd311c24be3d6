# shellcheck shell=bash
# Shared by the launch scripts; sourced, never run.
#
# A script declares its settings, then calls `settings_from "$@"`. A setting `run-name` is the flag --run-name=VALUE, the
# environment variable MAESTRO_RUN_NAME (the flag wins) and, in the script, the variable RUN_NAME. Scripts that a script
# calls see the same settings. Commands go to standard output, talk to standard error.
#
# Exit codes are those of the package: 0 done, 75 try again, 78 something the user has to change, 70 anything else.
set -euo pipefail
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: this is bash $BASH_VERSION, 4.4 or newer is needed; on macOS: brew install bash" >&2
  exit 78
fi
exec 3>&1 # where a dry run prints commands, also those inside of $(...)

readonly TRY_AGAIN=75 CONFIGURATION=78 INTERNAL=70
LAUNCH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

note() { printf '%s\n' "$*" >&2; }

# fail CODE MESSAGE: the message names the cure.
fail() {
  note "error: $2"
  exit "$1"
}

# ---- Settings -------------------------------------------------------------------------------------

SETTINGS=()
declare -A VARIABLE=() KIND=() DEFAULT=() ABOUT=()
REST=()  # what follows --
PLACE=() # --zone or --location, and --project, as gcloud takes them

required() { setting "$1" required "" "$2"; }
optional() { setting "$1" optional "$2" "$3"; }
switch() { setting "$1" switch "" "$2"; }

setting() {
  local upper=${1^^}
  SETTINGS+=("$1")
  VARIABLE[$1]=${upper//-/_} KIND[$1]=$2 DEFAULT[$1]=$3 ABOUT[$1]=$4
}

settings_from() {
  local name variable missing=""
  switch dry-run "print the commands, run none of them"
  for name in "${SETTINGS[@]}"; do
    variable=MAESTRO_${VARIABLE[$name]}
    set_to "$name" "${!variable:-${DEFAULT[$name]}}"
  done
  while (($#)); do
    case $1 in
      --) REST=("${@:2}") && break ;;
      --help) usage && exit ;;
      *) set_from "$1" && shift ;;
    esac
  done
  for name in "${SETTINGS[@]}"; do
    variable=${VARIABLE[$name]}
    [[ ${KIND[$name]} != required || -n ${!variable} ]] || missing+=" --$name=... or MAESTRO_$variable (${ABOUT[$name]});"
  done
  [[ -z $missing ]] || fail "$CONFIGURATION" "give$missing $0 --help lists all settings"
  # shellcheck disable=SC2034 # for the scripts
  PLACE=(${ZONE:+"--zone=$ZONE"} ${LOCATION:+"--location=$LOCATION"} ${PROJECT:+"--project=$PROJECT"})
}

set_to() {
  printf -v "${VARIABLE[$1]}" %s "$2"
  export "MAESTRO_${VARIABLE[$1]}=$2"
}

set_from() {
  local name=${1%%=*}
  name=${name#--}
  [[ $1 == --* && -n ${KIND[$name]-} ]] || fail "$CONFIGURATION" "unknown argument $1; $0 --help lists the settings"
  if [[ ${KIND[$name]} == switch ]]; then
    [[ $1 != *=* ]] || fail "$CONFIGURATION" "--$name takes no value; write --$name alone"
    set_to "$name" 1
  else
    [[ $1 == *=?* ]] || fail "$CONFIGURATION" "--$name needs a value; write --$name=VALUE"
    set_to "$name" "${1#*=}"
  fi
}

# The comment at the head of the script, then its settings.
usage() {
  local name
  sed -n '2,${/^#/!q;s/^# \{0,1\}//p;}' "$0"
  printf '\n'
  for name in "${SETTINGS[@]}"; do
    case ${KIND[$name]} in
      switch) printf '  --%-21s %s\n' "$name" "${ABOUT[$name]}" ;;
      required) printf '  --%-21s %s\n' "$name=..." "${ABOUT[$name]}; required" ;;
      optional) printf '  --%-21s %s\n' "$name=..." "${ABOUT[$name]}${DEFAULT[$name]:+ [${DEFAULT[$name]}]}" ;;
    esac
  done
}

# ---- Commands -------------------------------------------------------------------------------------

dry() { [[ -n $DRY_RUN ]]; }

# The words as a shell reads them back.
quoted() {
  local word words=() plain='^[A-Za-z0-9_./:=@%+,-]+$'
  for word in "$@"; do
    if [[ $word =~ $plain ]]; then
      words+=("$word")
    elif [[ ${word%%=*}= =~ ^--[a-z-]+=$ && $word == *=* ]]; then
      words+=("${word%%=*}=$(in_quotes "${word#*=}")")
    else
      words+=("$(in_quotes "$word")")
    fi
  done
  printf '%s\n' "${words[*]}"
}

in_quotes() { printf "'%s'" "${1//\'/\'\\\'\'}"; }

# Runs a command that changes something, and shows it; in a dry run it is only shown.
run() {
  if dry; then
    quoted "$@" >&3
  else
    note "+ $(quoted "$@")"
    "$@"
  fi
}

# ask DEFAULT COMMAND...: prints what a command that changes nothing says; nothing, where the thing it asks for is not
# there; DEFAULT in a dry run. Any other failure ends the script: no answer is no leave to create or to delete.
ask() {
  local default=$1 errors code=0
  shift
  if dry; then
    quoted "$@" >&3
    printf '%s\n' "$default"
    return
  fi
  errors=$(mktemp)
  "$@" 2>"$errors" || code=$?
  ((code != 127)) || fail "$CONFIGURATION" "$1 is not installed; see https://cloud.google.com/sdk/docs/install"
  if ((code)) && ! grep -qiE 'not.?found' "$errors"; then
    fail "$INTERNAL" "$(quoted "$@"): $(tail -n 3 "$errors")"
  fi
  rm -f "$errors"
}

# What Google Cloud says when it has no machines now or is out of order itself (a quota does not grow by waiting), and ssh
# when nobody answers.
readonly SHORTAGE='no more capacity|insufficient capacity|stockout|not enough resources|resource pool exhausted|unavailable:'
readonly SILENCE='connection (refused|reset|timed out|closed)|port 22|\[255\]|broken pipe|no route to host'

# despite shortage|silence COMMAND...: runs it, and again while it fails for that reason, at most $ATTEMPTS times, $PAUSE
# seconds apart; then 75. Any other failure ends the script.
despite() {
  local pattern=$SHORTAGE attempt output
  [[ $1 == shortage ]] || pattern=$SILENCE
  shift
  output=$(mktemp)
  for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
    if run "$@" 2>&1 | tee "$output" >&2; then
      rm -f "$output"
      return
    fi
    grep -qiE "$pattern" "$output" || fail "$INTERNAL" "that failed for good, as said above; correct it and run this again"
    note "attempt $attempt of $ATTEMPTS failed; the next one in $PAUSE s"
    sleep "$PAUSE"
  done
  rm -f "$output"
  return "$TRY_AGAIN"
}

# ---- The run --------------------------------------------------------------------------------------

# Does the mesh of the config divide over the slice? Asked before anything is created.
check_slice() {
  local python=${PYTHON:-python3}
  local has='import importlib.util as i; exit(not (i.find_spec("jax") and i.find_spec("maestro_jax")))'
  [[ $python != [!/]*/* ]] || python=$PWD/$python
  cd "$LAUNCH/.."
  if ! dry && ! "$python" -c "$has" 2>/dev/null; then
    note "warning: $python has no jax, so mesh and slice are not compared; set PYTHON to one that can"
  elif ! run "$python" -m maestro_jax.slice_check "--config=$CONFIG" "--accelerator=$ACCELERATOR" "${REST[@]}"; then
    fail "$CONFIGURATION" "nothing was created; change the setting named above, or --accelerator"
  fi
  cd - >/dev/null
}

# The last commit is what workers get: is the config in it? Asked before anything is created.
check_commit() {
  local root changed
  root=$(dirname "$LAUNCH")
  ! dry || return 0
  git -C "$root" rev-parse --quiet --verify HEAD >/dev/null 2>&1 ||
    fail "$CONFIGURATION" "$root has no commit to send; git init, git add and git commit there"
  # A file elsewhere, such as on the share, goes its own way; behind a colon is what its get_config is told.
  if [[ -n $CONFIG && $CONFIG != /* ]] && ! git -C "$root" cat-file -e "HEAD:${CONFIG%%:*}" 2>/dev/null; then
    fail "$CONFIGURATION" "${CONFIG%%:*} is not in the last commit, which is what runs; git add and git commit it"
  fi
  changed=$(git -C "$root" status --porcelain)
  [[ -z $changed ]] || note "warning: what is not committed does not run:"$'\n'"$changed"
}

# The chip of $ACCELERATOR, as the files in launch/env are named; nothing for one that has none.
chip() {
  case $ACCELERATOR in
    v5litepod-*) echo v5e ;;
    v5p-* | v6e-*) echo "${ACCELERATOR%%-*}" ;;
    h100x* | h200x*) echo "${ACCELERATOR%%x*}" ;;
  esac
}

# ---- TPUs -----------------------------------------------------------------------------------------

a_patient_command() {
  optional attempts 10 "how often to try while workers do not answer"
  optional pause 15 "seconds between two attempts"
}

# everywhere scp|ssh ARGUMENTS...: on all workers.
everywhere() {
  despite silence gcloud compute tpus tpu-vm "$@" "${PLACE[@]}" --worker=all ||
    fail "$TRY_AGAIN" "the workers of $NAME do not answer; see launch/tpu_vm/status.sh, then run this again"
}

a_tpu_vm() {
  required name "name of the TPU VM"
  required zone "its zone"
  optional project "" "project; empty: gcloud's own setting"
}

# What a TPU VM is made of.
a_new_tpu_vm() {
  a_tpu_vm
  required accelerator "such as v5litepod-64, v5p-128, v6e-256"
  required config "config file of the run; settings of it may follow --"
  optional runtime "" "TPU software version; empty: the one for the accelerator"
  optional network "" "network; empty: default"
  switch spot "cheaper, and may be taken away at any time"
}

runtime_version() {
  case $RUNTIME:$ACCELERATOR in
    :v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    :v5p-*) echo v2-alpha-tpuv5 ;;
    :v6e-*) echo v2-alpha-tpuv6e ;;
    :*) fail "$CONFIGURATION" "no --runtime is known for $ACCELERATOR; give one of gcloud compute tpus tpu-vm versions list --zone=$ZONE" ;;
    *) echo "$RUNTIME" ;;
  esac
}
