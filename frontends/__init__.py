"""Ways in and out: torch.compile backend, torch.export, model loaders, report views and the command line."""
