"""The verb `compare`: a recipe in several variants, trained alike and asked the same questions."""
