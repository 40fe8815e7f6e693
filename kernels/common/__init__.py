"""What the generators share: text snippets, naming, the description of a kernel family."""
