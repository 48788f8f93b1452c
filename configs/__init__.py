"""Example rigs, one YAML file each."""
