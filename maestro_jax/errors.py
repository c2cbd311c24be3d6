"""Errors that are the user's to fix. Commands print them as one line and exit 78 (do not restart)."""

EXIT_CONFIG = 78
EXIT_INTERNAL = 70
EXIT_LOST = 69  # another process of the run never came, or is gone; restart all


class UserError(Exception):
    """Bad input. The message is one line that names what is wrong, where, and the cure."""


class ConfigError(UserError):
    """A configuration that cannot run: unknown key, unknown name, wrong mesh."""


class DataError(UserError):
    """Data that cannot be read: names file, row and field."""
