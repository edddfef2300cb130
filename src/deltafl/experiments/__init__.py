"""The suites, one file each; they only compose the library."""
