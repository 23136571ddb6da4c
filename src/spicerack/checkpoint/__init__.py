"""Model folders: `files` finds what is in one, `reader` reads it tensor by tensor, `writer` makes a new one."""
