"""What encoders learn from: pictures with captions, from their sources to the batches of a
step."""
