"""The errors that reach a user: each says what was wrong, where, and what to do."""


class PlexrankError(Exception):
    """Base of all errors that plexrank raises on purpose. The CLI prints them without a traceback."""


class ConfigError(PlexrankError):
    """A configuration file is wrong; the message starts with `file:line: key:`."""


class SchemaError(PlexrankError):
    """Features and data do not fit each other."""


class DataError(PlexrankError):
    """A data file is missing, malformed or empty; the message says where the data comes from."""


class PluginError(PlexrankError):
    """A plugin is missing, clashes with another, or breaks its contract; both distributions are named."""


class BundleError(PlexrankError):
    """A bundle is truncated, edited, of another schema, or holds non-finite numbers."""


class CheckpointError(PlexrankError):
    """A training checkpoint cannot be written or resumed."""


class EventError(PlexrankError):
    """An event is refused; the message is the reason kept with it."""


class LogUnavailable(EventError):
    """A log does not answer now; what was asked may be asked again."""


class LogGap(EventError):
    """A position is not in the log: older records are gone, or the log was begun anew. Says which and what to do."""


class DeltaGap(BundleError):
    """A delta does not follow the version that is there."""


class ScorerError(PlexrankError):
    """A scorer has no scores for a request. `reason`: why in short, without ids; an answer's `degraded` says it."""

    def __init__(self, detail: str, reason: str) -> None:
        super().__init__(detail)
        self.reason = reason


class RequestError(PlexrankError):
    """A request is refused. `status` is the HTTP status, `pointer` the JSON pointer of the fault."""

    def __init__(self, detail: str, *, status: int = 422, pointer: str = "") -> None:
        super().__init__(detail)
        self.status = status
        self.pointer = pointer
