"""Exit codes, and errors that are the user's to fix: commands print those as one line and exit 78."""

EXIT_LOST = 69  # another process of the run never came, or is gone; restart all
EXIT_INTERNAL = 70  # a fault of ours, or numbers that are not finite
EXIT_PREEMPTED = 75  # told to stop, or experts are out; start the same command again
EXIT_CONFIG = 78  # something the user has to change; do not restart


class UserError(Exception):
    """Bad input. The message is one line that names what is wrong, where, and the cure.

    Attributes:
      agreed: whether all processes of the run end with it; then they wait for each other.
    """

    agreed = False


class ConfigError(UserError):
    """A configuration that cannot run: unknown key, unknown name, wrong mesh."""


class NonFiniteError(Exception):
    """Numbers of the policy that are not finite, in all processes of a run alike.

    The message is one line that names them and the cure; commands print it and exit 70.
    """


class DataError(UserError):
    """Data that cannot be read: names file, row and field."""
