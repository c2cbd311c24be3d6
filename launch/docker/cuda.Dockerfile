# The trainer on NVIDIA GPUs. Built from the last commit:
#   git archive HEAD | docker build --file=launch/docker/cuda.Dockerfile --tag=REGISTRY/maestro-cuda:1 -
FROM python:3.11.13-slim-bookworm
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
# CUDA's libraries come with jax[cuda12]; the driver's from the host, at this place on GKE.
ENV LD_LIBRARY_PATH=/usr/local/nvidia/lib64 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# What opencv loads. Their versions are the base image's; a pin would break with its next security update.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends libgl1 libglib2.0-0 && rm -rf /var/lib/apt/lists/*

WORKDIR /maestro
# In a layer of their own: they change seldom.
COPY requirements.txt ./
RUN pip install --requirement requirements.txt "jax[cuda12]"
COPY . .
RUN pip install --requirement requirements.txt --editable '.[cuda12,gcs,suite,sandbox]'

# Which flags: MAESTRO_CHIP in the environment.
ENTRYPOINT ["/maestro/launch/with_flags.sh"]
CMD ["python", "-m", "maestro_jax.train", "--help"]
