"""The few error types that callers catch.

Every message says what was wrong (with both values), why it matters and what to type next. All of them mean: nothing was
trained, nothing was overwritten. The command line prints the message and exits with code 2.
"""


class EWCError(ValueError):
    """Base of all errors that `hf_ewc` raises for a mistake in its input."""


class ConfigError(EWCError):
    """A setting is unknown, out of range, or contradicts another one."""


class DataError(EWCError):
    """Training text, probe or question files that cannot be used as they are."""


class FisherFormatError(EWCError):
    """A Fisher artifact that is damaged, incomplete, edited, or of a format that this version does not read."""


class FisherMismatchError(EWCError):
    """A healthy Fisher artifact that belongs to another model, revision, tokenizer or vocabulary."""


class HubError(EWCError):
    """
    The Hub answered, and the answer was no: no such repository, no access, a stale parent commit, a name that is taken.
    """


class HubUnavailableError(HubError):
    """
    The Hub did not answer, or failed, also after the client's retries. The same command may work later: the command line exits
    with code 1.
    """
