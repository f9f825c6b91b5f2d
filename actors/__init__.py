"""Ray actors: thin shells around the classes in `farm/`, and how they are started, found and stopped."""
