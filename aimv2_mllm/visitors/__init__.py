"""What the page in the browser shows: the models, each visitor's conversation, what was seen."""
