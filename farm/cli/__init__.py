"""The `farm` command. Heavy imports happen inside commands, so that `farm --help` answers at once."""
