"""One file per command: `add_arguments(parser)` without torch, `run(args) -> Result`."""
