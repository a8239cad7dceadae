"""The `nvit` command: one file a command, its flags, its one library call, its table."""
