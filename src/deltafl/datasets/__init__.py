"""Data sets: each family turns what a user names into a `Task`."""
