"""Features of pictures that a frozen tower computed once, on disk."""
