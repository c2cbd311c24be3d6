# Servers of experts: vLLM. A skill that needs another server gets an image of its own. Weights are not in it.
#   docker build --file=launch/docker/experts.Dockerfile --tag=REGISTRY/maestro-experts:1 launch/docker
FROM vllm/vllm-openai:v0.11.0
ENV VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
# The image would start its API server whatever it is told; here a container runs what it is given: vllm serve MODEL ...
ENTRYPOINT []
CMD ["vllm", "serve", "--help"]
EXPOSE 8000
