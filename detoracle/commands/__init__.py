"""One module a command (or a few that belong together), each a thin layer over the rooms."""
