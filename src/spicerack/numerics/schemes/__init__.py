"""Named schemes, one file each: levels, block, and the types of scale and zero point."""
