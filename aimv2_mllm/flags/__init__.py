"""The flags of the command line, by what verbs do."""
