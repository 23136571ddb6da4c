"""Observers of ranges, one file each: from all inputs of a layer to the one scale that they are rounded by."""
