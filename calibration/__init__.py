"""GEOMETRY: how the two cameras see one scene. Images and numbers in, a `Rig` out."""
