"""What each kind of stage builds, trains and saves, and the pass that keeps a tower's features."""
