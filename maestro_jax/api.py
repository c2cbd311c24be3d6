"""What the commands do, as functions: for notebooks, scripts and tests, any number of times in one process.

```
from maestro_jax import api

result = api.train("configs/quickstart.py", "runs/quickstart", progress="terminal")
report = api.evaluate("runs/evaluation", checkpoint=result.workdir)
```

They read no flags and end no process. What the user has to change is a `UserError` of one line.
"""

from maestro_jax.errors import ConfigError, DataError, UserError
from maestro_jax.jobs.doctor import Diagnosis, doctor
from maestro_jax.jobs.evaluate import Report, evaluate
from maestro_jax.jobs.export import Exported, export
from maestro_jax.jobs.plan import Plan, plan
from maestro_jax.jobs.train import train
from maestro_jax.observe.listening import Event
from maestro_jax.parallel.preemption import Preempted
from maestro_jax.training.result import TrainResult

__all__ = [
    "ConfigError",
    "DataError",
    "Diagnosis",
    "Event",
    "Exported",
    "Plan",
    "Preempted",
    "Report",
    "TrainResult",
    "UserError",
    "doctor",
    "evaluate",
    "export",
    "plan",
    "train",
]
