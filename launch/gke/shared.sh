# shellcheck shell=bash
# shellcheck disable=SC2034 # scripts and manifests use what is set here
# Shared by the scripts of this folder; sourced after ../common.sh.

a_namespace() {
  optional namespace maestro "namespace of the runs"
  optional context "" "context of kubectl; empty: the current one"
}

# Sets what GKE calls the machines of $ACCELERATOR: MODEL (label of its nodes), SHAPE (of a TPU slice), MACHINE, HOSTS, CHIPS
# (of a host). The shapes are those of maestro_jax/aot/slices.py, again: there need be no JAX where this runs.
declare -A FLAT=([1]=1x1 [4]=2x2 [8]=2x4 [16]=4x4 [32]=4x8 [64]=8x8 [128]=8x16 [256]=16x16)
# Of v5p the number is of cores, two a chip.
declare -A CUBE=([8]=2x2x1 [16]=2x2x2 [32]=2x2x4 [64]=2x4x4 [128]=4x4x4 [256]=4x4x8 [512]=4x8x8 [1024]=8x8x8 [2048]=8x8x16
  [4096]=8x16x16)
machines_of() {
  local kind=${ACCELERATOR%%[-x]*} count=${ACCELERATOR#*[-x]}
  [[ $count =~ ^[0-9]+(x[0-9]+)?$ ]] || unknown_accelerator
  SHAPE=""
  case $kind in
    v5litepod | v6e) SHAPE=${FLAT[$count]-} HOSTS=$((count > 8 ? count / 4 : 1)) CHIPS=$((count > 8 ? 4 : count)) ;;
    v5p) SHAPE=${CUBE[$count]-} HOSTS=$((count / 8)) CHIPS=4 ;;
    *) HOSTS=$([[ $count != *x* ]] && echo 1 || echo "${count#*x}") CHIPS=${count%x*} ;;
  esac
  case $kind in
    v5litepod) MODEL=tpu-v5-lite-podslice MACHINE=ct5lp-hightpu-${CHIPS}t ;;
    v6e) MODEL=tpu-v6e-slice MACHINE=ct6e-standard-${CHIPS}t ;;
    v5p) MODEL=tpu-v5p-slice MACHINE=ct5p-hightpu-${CHIPS}t ;;
    a100) MODEL=nvidia-a100-80gb MACHINE=a2-ultragpu-${CHIPS}g ;;
    h100) MODEL=nvidia-h100-80gb MACHINE=a3-highgpu-${CHIPS}g ;;
    h200) MODEL=nvidia-h200-141gb MACHINE=a3-ultragpu-${CHIPS}g ;;
    *) unknown_accelerator ;;
  esac
  ! is_tpu || [[ -n $SHAPE ]] || unknown_accelerator
}

is_tpu() { [[ $MODEL == tpu-* ]]; }

unknown_accelerator() {
  fail "$CONFIGURATION" "--accelerator=$ACCELERATOR is unknown; use one such as v5litepod-64, v5p-128, v6e-256 or h100x8x2"
}

on_cluster() { run kubectl ${CONTEXT:+"--context=$CONTEXT"} "$@"; }

# Applies the manifests in files in which ${NAME} stands for the value of that variable. A dry run prints them.
apply() {
  local file text="" command=(kubectl ${CONTEXT:+"--context=$CONTEXT"} apply --server-side --filename=-)
  for file in "$@"; do text+="---"$'\n'"$(rendered "$LAUNCH/gke/manifests/$file")"$'\n'; done
  if dry; then
    printf "%s <<'MANIFESTS'\n%sMANIFESTS\n" "$(quoted "${command[@]}")" "$text"
  else
    note "+ $(quoted "${command[@]}") < $*"
    "${command[@]}" <<<"$text"
  fi
}

rendered() {
  local done="" rest name
  rest=$(<"$1")
  while [[ $rest =~ ^([^$]*)\$\{([A-Z_]+)\}(.*)$ ]]; do
    name=${BASH_REMATCH[2]}
    done+=${BASH_REMATCH[1]}${!name}
    rest=${BASH_REMATCH[3]}
  done
  printf '%s%s' "$done" "$rest"
}

# A string that YAML reads as it is, and a command of such strings; in commands, Kubernetes puts variables for $(NAME).
yaml_string() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  printf '"%s"' "${text//$'\t'/\\t}"
}

yaml_command() {
  local item separator=""
  printf '['
  for item in "$@"; do
    printf '%s%s' "$separator" "$(yaml_string "${item//\$(/\$\$(}")"
    separator=", "
  done
  printf ']'
}
