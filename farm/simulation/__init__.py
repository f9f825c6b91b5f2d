"""A farm that does not exist, to check the dispatcher's rules: everything in it follows from one seed."""
