"""As configs/qwen3_vl_4b.py, from Qwen3-VL-8B-Instruct: the sizes are in the checkpoint's config.json."""

from ml_collections import ConfigDict

from configs import qwen3_vl_4b


def get_config() -> ConfigDict:
    config = qwen3_vl_4b.get_config()
    config.policy.architecture = ConfigDict()
    config.policy.init_from = "checkpoints/Qwen3-VL-8B-Instruct"
    return config
