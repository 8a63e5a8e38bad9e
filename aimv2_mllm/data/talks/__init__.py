"""What models that talk learn from: conversations, how they are written in tokens, from
their sources to the batches of a step."""
