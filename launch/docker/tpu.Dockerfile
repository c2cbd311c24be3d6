# The trainer on TPUs. Built from the last commit:
#   git archive HEAD | docker build --file=launch/docker/tpu.Dockerfile --tag=REGISTRY/maestro-tpu:1 -
FROM python:3.11.13-slim-bookworm
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

# What opencv loads. Their versions are the base image's; a pin would break with its next security update.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends libgl1 libglib2.0-0 && rm -rf /var/lib/apt/lists/*

WORKDIR /maestro
# In a layer of their own: they change seldom.
COPY requirements.txt ./
RUN pip install --requirement requirements.txt "jax[tpu]"
COPY . .
RUN pip install --requirement requirements.txt --editable '.[tpu,gcs,suite,sandbox]'

# Which flags: MAESTRO_CHIP in the environment.
ENTRYPOINT ["/maestro/launch/with_flags.sh"]
CMD ["python", "-m", "maestro_jax.train", "--help"]
