"""The command line: each command parses, calls one core function and prints what it returned."""
