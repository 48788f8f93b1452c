"""From a configuration to the source it describes. Only the source that is asked for is imported."""

from __future__ import annotations

from pipeline.config import DeviceSource, FolderSource, StreamSource, SyntheticSource
from pipeline.errors import SourceError
from pipeline.frame import Camera
from pipeline.sources.base import Source


def open_source(config: StreamSource | DeviceSource | FolderSource | SyntheticSource, camera: Camera) -> Source:
    """The source that a configuration describes, not yet connected: call its `open`.

    Raises:
        SourceError: at once, for a description that no camera can answer (a URL of an unknown scheme).
    """
    if isinstance(config, StreamSource):
        from pipeline.sources.stream import StreamCamera

        return StreamCamera(config, camera)
    if isinstance(config, DeviceSource):
        from pipeline.sources.device import DeviceCamera

        return DeviceCamera(config, camera)
    if isinstance(config, FolderSource):
        from pipeline.sources.folder import ImageFolder

        return ImageFolder(config, camera)
    if isinstance(config, SyntheticSource):
        from pipeline.sources.synthetic import SyntheticCamera

        return SyntheticCamera(config, camera)
    raise SourceError(f"a source of kind {getattr(config, 'kind', type(config).__name__)!r} is not known")
