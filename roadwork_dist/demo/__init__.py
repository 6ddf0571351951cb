"""Photos for demonstrations: rendered street scenes and pasted cut-outs."""
