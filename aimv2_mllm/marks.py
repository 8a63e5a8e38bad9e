"""The marks by which modules that know nothing of each other mean the same."""

IMAGE_TOKEN = "<image>"  # where a picture goes in a text
UNSUPERVISED = -100  # the label of a token that is not to be learned, as in transformers
TURNS = "turns"  # of what was left out: last turns of rows that are used, counted beside rows
