"""A finished run -> folders that other tools load, and the proof that they compute the same."""
