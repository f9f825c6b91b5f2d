"""The farm's HTTP endpoint, without Ray."""
