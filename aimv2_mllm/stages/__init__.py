"""What each kind of stage builds and trains, and a recipe's stages in order, in a run folder."""
