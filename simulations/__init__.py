"""The command line: running federations on this machine, looking at them, measuring them."""
