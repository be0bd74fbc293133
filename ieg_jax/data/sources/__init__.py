"""Where examples come from; `load` is the registry of the sources."""
