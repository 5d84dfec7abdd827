"""The one error a user is meant to read: what is wrong, where, and what to do."""


class AwqconvError(Exception):
    """Bad input or a state that a run cannot go on from; the command line exits with `exit_code`.

    `what` says what is wrong with the numbers seen, `where` names the file, tensor or module,
    and `fix` is what to do, a command where there is one.
    """

    exit_code = 2

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__("\n".join(s for s in (f"{where}: {what}" if where else what, fix) if s))


class VerificationError(AwqconvError):
    """Bytes were readable and are wrong: the command line exits with 1."""

    exit_code = 1
