"""TENSORS: the fusion network, trained, judged and run. Takes arrays and knows no camera."""
