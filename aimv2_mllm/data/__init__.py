"""What the stages are fed: pictures, captions and conversations, each a pure function of (seed,
split, index)."""
