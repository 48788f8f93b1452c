"""Groups of commands, each in a file of its own; pipeline/cli.py registers them."""
