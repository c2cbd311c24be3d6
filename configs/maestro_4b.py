"""The 4B with the paper's experts instead of the suite's (configs/registry/maestro.py), or out-of-domain ones besides.

python -m maestro_jax.doctor --config configs/maestro_4b.py
python -m maestro_jax.train --config configs/maestro_4b.py --workdir runs/maestro --config.data.kind=verl ...
python -m maestro_jax.doctor --config configs/maestro_4b.py:out_of_domain
"""

from ml_collections import ConfigDict

from configs import qwen3_vl_4b
from configs.registry import maestro, out_of_domain

REGISTRIES = {"maestro": maestro, "out_of_domain": out_of_domain}


def get_config(registry: str = "maestro") -> ConfigDict:
    config = qwen3_vl_4b.get_config()
    config.registry = REGISTRIES[registry].get_registry()
    return config
