"""Other projects' quantizers, one file each, run in environments of their own: of ours they import `exchange` alone."""
