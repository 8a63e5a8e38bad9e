"""Models of ours inside lmms-eval, and the verb that runs it: its tasks, its loop, our answers."""
