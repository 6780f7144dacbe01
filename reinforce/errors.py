"""The two ways a run ends early on purpose; every other exception is a failure (exit code 1)."""


class ConfigError(Exception):
    """Your configuration or input: one sentence that names the flag and the fix. Exit code 2."""


class RetryError(Exception):
    """Not your fault and maybe gone next time: run the same command again. Exit code 75."""
