"""What the project costs on this machine, beside the same in other frameworks: `make bench`."""
