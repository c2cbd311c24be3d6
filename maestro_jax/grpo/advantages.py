"""Group-relative advantages, on the host in numpy (GRPO: Shao et al. 2024, arXiv 2402.03300)."""

import numpy as np


def group_advantages(
    rewards: np.ndarray, valid: np.ndarray, normaliser: str, epsilon: float = 1e-6
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages of the valid members of each group.

    Args:
      rewards: float `[B, G]`.
      valid: bool `[B, G]`; members hit by an infrastructure failure are False: they are neither
        in the baseline nor in the loss.
      normaliser: "std" divides by the group's standard deviation (GRPO), "none" does not
        (Dr.GRPO, arXiv 2503.20783), "leave_one_out" subtracts the mean of the others (RLOO,
        arXiv 2402.14740).
      epsilon: added to the standard deviation.

    Returns:
      float32 `[B, G]`, 0 for invalid members and for groups without contrast; and bool `[B]`,
      True for groups whose valid members differ in reward (the others give no gradient).
    """
    count = np.maximum(valid.sum(axis=1, keepdims=True), 1)
    kept = np.where(valid, rewards, 0.0)
    centred = np.where(valid, rewards - kept.sum(axis=1, keepdims=True) / count, 0.0)
    deviation = np.sqrt((centred**2).sum(axis=1, keepdims=True) / count)
    contrast = deviation[:, 0] > 1e-9
    if normaliser == "std":
        centred = centred / (deviation + epsilon)
    elif normaliser == "leave_one_out":
        # reward - mean of the others = (reward - mean) * n / (n - 1)
        centred = centred * count / np.maximum(count - 1, 1)
    return np.where(contrast[:, None], centred, 0.0).astype(np.float32), contrast
