"""What can go wrong because of what a user gave us, as opposed to a bug of ours.

DspfusionError           one line: what, why and what to do; the command exits with status 2
├── ConfigError          a configuration that cannot be run
├── SourceError          a camera or recording that cannot be read
│   └── SourceEnded      a recording is over (no fault)
└── PublishError         an endpoint that cannot be opened
"""


class DspfusionError(Exception):
    """The base of every error that a user can mend; its text is shown as it is, without a traceback."""


class ConfigError(DspfusionError):
    """A configuration that cannot be run."""


class SourceError(DspfusionError):
    """A camera or a recording that cannot be opened or read. Never carries a password."""


class SourceEnded(SourceError):
    """The recording is over."""


class PublishError(DspfusionError):
    """An endpoint that cannot be opened for publishing."""
