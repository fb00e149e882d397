"""The three ways in which a command ends early. Each becomes one line and an exit status, never a traceback."""


class UserError(ValueError):
    """The user's mistake: names the value, the limit and the remedy. Exit status 2."""


class RunError(RuntimeError):
    """A failure of the environment, such as a full disk or a damaged file: names it and the remedy. Exit status 1."""


class Stopped(Exception):
    """A signal stopped the work; what is stored is kept, and the same command resumes. Exit status 128 + signal."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal
