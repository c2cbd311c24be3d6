"""Settings of the device mesh, with their defaults."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per axis; -1 on one axis means all that are left."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
