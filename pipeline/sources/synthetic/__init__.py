"""The synthetic rig: two cameras that look at one moving street, and know the truth about it."""

from pipeline.sources.synthetic.camera import SyntheticCamera
from pipeline.sources.synthetic.geometry import infrared_from_visible, project, true_rig

__all__ = ["SyntheticCamera", "infrared_from_visible", "project", "true_rig"]
