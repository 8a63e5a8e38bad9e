"""A model that talks: prompts, answers, what it remembers, at a keyboard and for visitors."""
