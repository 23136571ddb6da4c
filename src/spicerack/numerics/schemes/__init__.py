"""Named schemes, one file each."""
