"""Both roles in one process, without HTTP."""
